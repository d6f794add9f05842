"""What an experiment names outside its config: backbones to start from, a classifier that teaches."""

from pathlib import Path

from modicum.errors import InputError
from modicum.files import content_hash
from modicum.settings import Experiment


def named_inputs(experiment: Experiment) -> tuple[Experiment, dict[str, str]]:
    """The experiment with absolute paths, valid from everywhere, and the fingerprint of what lies there, by setting. Raises InputError."""
    inputs = {}
    for stage in ("pretrain", "finetune"):
        section = getattr(experiment, stage)
        if section.init not in (None, "pretrain", "random"):
            path = _existing(f"{stage}.init", section.init, "backbone folder or file")
            experiment = with_setting(experiment, stage, init=str(path))
            inputs[f"{stage}.init"] = content_hash(path)
    method = experiment.finetune.method
    if method.get("teacher_from") is not None:
        path = _existing("finetune.method.teacher_from", str(method["teacher_from"]), "classifier folder")
        experiment = with_setting(experiment, "finetune", method={**method, "teacher_from": str(path)})
        inputs["finetune.method.teacher_from"] = content_hash(path)
    return experiment, inputs


def with_setting(experiment: Experiment, section: str, **values: object) -> Experiment:
    """The experiment with other values in one of its sections."""
    return experiment.model_copy(update={section: getattr(experiment, section).model_copy(update=values)})


def _existing(key: str, named: str, kind: str) -> Path:
    path = Path(named).expanduser().absolute()
    if not path.exists():
        raise InputError(f"{key} = {named!r}: there is no such {kind}.")
    return path
