"""One YAML file and `key=value` words -> one frozen, validated `Experiment` (`settings.py`), or one sentence on what is wrong.

Nothing heavy is imported: a finished run must be able to say so at once.
"""

import difflib
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from modicum.errors import InputError
from modicum.settings import Experiment

Model = TypeVar("Model", bound=BaseModel)
MERGE = "tag:yaml.org,2002:merge"


def shipped_configs() -> list[str]:
    return sorted(_shipped())


def _shipped() -> dict[str, Traversable]:
    """By name; recipes lie in a folder of their own."""
    root = files("modicum.configs")
    entries = (entry for folder in (root, root / "recipes") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry for entry in entries}


class _Reader(yaml.SafeLoader):
    """YAML's safe reader, which refuses a key given twice instead of keeping the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as it is written: merge keys (`<<`) bring in their mappings later
        written = [key for key, _ in node.value if key.tag != MERGE]
        keys = [self.construct_object(key, deep=True) for key in written]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", written[number].start_mark)
        return node


def _read(text: str) -> Any:
    """What `text` says in YAML, of a file or of one value. Raises yaml.YAMLError."""
    try:
        return _Reader(text).get_single_data()
    except ValueError as error:  # a day that no month has, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None


def read_config(config: str) -> dict[str, Any]:
    """The mapping in a YAML file, or in the shipped config of that name. Raises InputError naming the file.

    A run folder's experiment.yaml is a config too; its block `provenance`, which says what made the run, is left out.
    """
    path = Path(config)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise InputError(f"There is no config file {path}.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path} is not a text file in UTF-8, so it is no config.") from None
    elif config in shipped_configs():
        text = _shipped()[config].read_text(encoding="utf-8")
    else:
        raise InputError(f"Unknown config {config!r}{did_you_mean(config, shipped_configs())} The path of a YAML file does as well.")
    try:
        content = _read(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{config} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{config} holds no mapping of settings.")
    content.pop("provenance", None)
    return content


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets `section.key=value` in place; the value is read as YAML. A method given by name alone becomes a mapping first."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"{override!r} is not of the form key=value, for example finetune.labels=100.")
    try:
        value = _read(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", error)).split())  # without its place: there is one line
        raise InputError(f"The value of {override!r} is not valid YAML ({problem}); quote it if it is a text.") from None
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        below = content.get(parent) or {}
        if isinstance(below, str):  # `method: moco_v2` is edited as {name: moco_v2}
            below = {"name": below}
        if not isinstance(below, dict):
            raise InputError(f"{'.'.join(parents[: depth + 1])} holds {below!r}, so {key} cannot be set.")
        content[parent] = dict(below)  # a copy: an alias in the file may share the block with others
        content = content[parent]
    content[last] = value


def load_experiment(config: str, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of a YAML file or shipped config, with `key=value` overrides on top. Raises InputError."""
    content = read_config(config)
    for override in overrides:
        apply_override(content, override)
    return validate(Experiment, content, source=config)


def validate(model: type[Model], content: dict[str, Any], source: str, prefix: str = "") -> Model:
    """`content` as a `model`; its first mistake becomes one sentence that names the key and, for a mistyped key, the nearest."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise InputError(_sentence(model, error, source, prefix)) from None


def _sentence(model: type[BaseModel], error: ValidationError, source: str, prefix: str) -> str:
    mistakes = error.errors()
    mistake = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    known: type[BaseModel] | None = model
    path: list[str] = []
    for part in mistake["loc"]:
        fields = known.model_fields if known else {}
        if path and not fields and not isinstance(part, int):
            break  # the rest names branches of a union
        path.append(str(part))
        if part in fields:
            annotation = fields[str(part)].annotation
            known = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    key = prefix + ".".join(path)
    if mistake["type"] == "extra_forbidden":
        return f"{source}: unknown key {key!r}{did_you_mean(path[-1], known.model_fields if known else ())}"
    reasons = {m["msg"].removeprefix("Value error, ") for m in mistakes if m["loc"][: len(path)] == mistake["loc"][: len(path)]}
    wanted = " or ".join(sorted(reason[0].lower() + reason[1:] for reason in reasons)).replace(" or input should ", " or ")
    return f"{source}: {key} = {mistake['input']!r} is not possible: {wanted}."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?).` with the nearest known word, or a list of all where nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known are {', '.join(known)}." if known else "."


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists are values."""
    if not isinstance(content, dict) or not content:
        return {prefix.removesuffix("."): content}
    return {key: value for name, below in content.items() for key, value in flatten(below, f"{prefix}{name}.").items()}
