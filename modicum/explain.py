"""The experiment as YAML that says of every key what it means: `modicum config`."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel

from modicum.settings import Experiment

if TYPE_CHECKING:
    from modicum.resolve import Reason

COMMENT_COLUMN = 44
Meanings = Mapping[str, str]


def commented(experiment: Experiment, reasons: "Iterable[Reason]" = ()) -> str:
    """YAML that `modicum run` accepts; after each value its meaning, and why where `auto` was decided. Imports torch, for the methods."""
    meanings = dict(_meanings(Experiment))
    for stage in ("pretrain", "finetune"):
        meanings |= _method_meanings(stage, getattr(experiment, stage).method)
    for reason in reasons:
        meanings[reason.key] = "; ".join(filter(None, [meanings.get(reason.key, ""), f"auto: {reason.why}"]))
    return "\n".join(_lines(experiment.model_dump(mode="json"), meanings)) + "\n"


def _lines(content: Mapping[str, Any], meanings: Meanings, prefix: str = "", indent: str = "") -> Iterator[str]:
    for key, value in content.items():
        path = f"{prefix}{key}"
        nested = isinstance(value, dict) and value
        text = f"{indent}{key}:" if nested else f"{indent}{key}: {_scalar(value)}"
        meaning = " ".join(meanings.get(path, "").split())
        yield f"{text:<{COMMENT_COLUMN}}  # {meaning}" if meaning else text
        if nested:
            yield from _lines(value, meanings, f"{path}.", f"{indent}  ")


def _scalar(value: Any) -> str:
    """One line of YAML, lists and empty mappings in flow style."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


def _meanings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if field.description:
            yield f"{prefix}{name}", field.description
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _meanings(kind, f"{prefix}{name}.")


def _method_meanings(stage: str, method: Mapping[str, Any]) -> dict[str, str]:
    from modicum.method import find_method, settings_model

    found = find_method(stage, str(method.get("name")))
    summary = (_file_doc(found) or "").partition("\n")[0]
    prefix = f"{stage}.method."
    return {f"{prefix}name": summary, **dict(_meanings(settings_model(found), prefix))}


def _file_doc(kind: type) -> str | None:
    """Of the file that defines a class: what the method is, with its paper."""
    return sys.modules[kind.__module__].__doc__
