"""What an experiment names outside its config: backbones to start from, a classifier that teaches."""

from collections.abc import Iterable
from pathlib import Path

from modicum.errors import InputError
from modicum.files import content_hash, expanded
from modicum.settings import Experiment


def named_inputs(experiment: Experiment) -> tuple[Experiment, dict[str, str]]:
    """The experiment with absolute paths, valid from everywhere, and the fingerprint of what lies there, by setting. Raises InputError."""
    inputs = {}
    for stage, words in (("pretrain", (None,)), ("finetune", ("pretrain", "random"))):
        section = getattr(experiment, stage)
        if section.init not in words:
            path = _existing(f"{stage}.init", section.init, "backbone folder or file")
            experiment = with_setting(experiment, stage, init=str(path))
            inputs[f"{stage}.init"] = content_hash(path)
    method = experiment.finetune.method
    if method.get("teacher_from") is not None:
        path = _existing("finetune.method.teacher_from", str(method["teacher_from"]), "classifier folder")
        experiment = with_setting(experiment, "finetune", method={**method, "teacher_from": str(path)})
        inputs["finetune.method.teacher_from"] = content_hash(path)
    return experiment, inputs


def refuse_clearing(experiment: Experiment, folders: Iterable[Path]) -> None:
    """Raises InputError where the experiment would read what lies in one of `folders`, which are to be cleared."""
    method, data = experiment.finetune.method, experiment.data
    named = {
        "data.root": data.root,
        "data.labels": data.labels,
        "pretrain.init": experiment.pretrain.init,
        "finetune.init": experiment.finetune.init,
        "finetune.method.teacher_from": method.get("teacher_from"),
    }
    for folder in folders:
        for key, path in named.items():
            if path in (None, "pretrain", "random"):
                continue
            if expanded(path).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{key} = {path} lies in {folder}, which this command would clear: choose another folder by --run.")


def with_setting(experiment: Experiment, section: str, **values: object) -> Experiment:
    """The experiment with other values in one of its sections."""
    return experiment.model_copy(update={section: getattr(experiment, section).model_copy(update=values)})


def _existing(key: str, named: str, kind: str) -> Path:
    path = expanded(named).absolute()
    if not path.exists():
        raise InputError(f"{key} = {named!r}: there is no such {kind}.")
    return path
