"""Backbones from other formats: weights that start a stage, from our own folders, safetensors files and foreign checkpoints."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from modicum.checkpoint import (
    Preprocessing,
    fill,
    load_backbone,
    load_checkpoint,
    load_classifier,
    load_projector,
    load_weights,
    read_config,
    refusing,
)
from modicum.errors import InputError
from modicum.networks import Backbone, create_backbone
from modicum.networks.backbones import keep_projector, kept_layer
from modicum.randomness import seeded
from modicum.settings import DataSettings, Experiment

CONTAINERS = ("state_dict", "model", "model_state_dict", "teacher", "student")  # where checkpoints keep the weights


def initial_backbone(init: str | None, experiment: Experiment, projector_layers: int = 0) -> Backbone:
    """The experiment's backbone with the weights of `init`, or random ones drawn from the seed where it is None.

    `init` is a backbone folder of ours or timm's, a safetensors file or a torch checkpoint of any project, whose entries may carry a
    prefix such as `module.encoder_q.`. Every weight of the backbone is found, or InputError says what the file holds instead.
    With `projector_layers` 1 the first layer of the projector that lies beside a folder's backbone stays behind its features.
    """
    backbone = create_backbone(experiment.backbone, int(experiment.data.channels), int(experiment.data.image_size), experiment.seed)
    if init is None:
        return _with_random_projector(backbone, experiment.seed) if projector_layers else backbone
    path = _weights_in(Path(init))
    if path.is_dir():
        given, _ = load_backbone(path)
        if projector_layers and not given.architecture.projector:
            given = keep_projector(given, load_projector(path))
        expected = replace(backbone.architecture, projector=given.architecture.projector if projector_layers else 0)
        if given.architecture != expected:
            differences = [
                f"{name} {getattr(given.architecture, name)!r} for {value!r}"
                for name, value in vars(expected).items()
                if getattr(given.architecture, name) != value
            ]
            raise InputError(
                f"The backbone in {path} does not fit the config: it has {'; '.join(differences)}. Set backbone.* and data.* as in its run."
            )
        return given
    if projector_layers:
        raise InputError(f"finetune.projector_layers = 1 needs a backbone folder that simclr_v2 wrote; {path} is a file: choose 0.")
    with refusing(f"{path} cannot be read as a checkpoint"):
        fill(backbone.network, _backbone_part(_read_weights(path), backbone.network.state_dict(), path), path)
    return backbone


def _with_random_projector(backbone: Backbone, seed: int) -> Backbone:
    with seeded(seed, "projector"):
        return keep_projector(backbone, kept_layer(backbone.num_features, backbone.num_features))


def refuse_unfit_teacher(key: str, folder: str, data: DataSettings, class_names: Sequence[str]) -> None:
    """Raises InputError unless `folder`, named by the setting `key`, holds a classifier of these classes and of images like these."""
    _, theirs, classes = load_classifier(Path(folder))
    if classes != tuple(class_names):
        raise InputError(f"{key} = {folder!r} knows other classes: {_listed(classes)}, where the data have {_listed(class_names)}.")
    ours = asdict(Preprocessing.of(data))
    unlike = [f"{name} {value} for {ours[name]}" for name, value in asdict(theirs).items() if value != ours[name]]
    if unlike:
        raise InputError(f"{key} = {folder!r} was made for other images: it has {'; '.join(unlike)}. Set data.* as in its run.")


def _listed(classes: Sequence[str], most: int = 5) -> str:
    return ", ".join(classes[:most]) + (f" and {len(classes) - most} more" if len(classes) > most else "")


def _weights_in(path: Path) -> Path:
    """Of a folder that timm wrote the file with the weights, which is read as any other; a folder of ours is itself."""
    if not (path / "config.json").is_file() or "modicum" in read_config(path):
        return path
    return next((file for file in (path / "model.safetensors", path / "pytorch_model.bin") if file.is_file()), path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"There is no backbone folder or file {path} to start from.")
    if path.suffix == ".safetensors":
        return load_weights(path)
    content = load_checkpoint(path, f"{path} cannot be read as a checkpoint")
    if not isinstance(content, dict):
        raise InputError(f"{path} cannot be read as a checkpoint: it holds a {type(content).__name__}, no tensors by name.")
    content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), content)
    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not weights:
        raise InputError(
            f"{path} cannot be read as a checkpoint: it holds no tensors by name. The backbone of a run lies in its pretrain/backbone."
        )
    return weights


def _backbone_part(weights: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The entries that the backbone wants, under the one prefix that all of them share; heads and the like are left aside.

    Further entries in the backbone's own parts, such as a sixth block of a layer of five, are another network's.
    """
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in weights if name.endswith(first)]
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in weights for name in wanted):
            parts = {name.partition(".")[0] for name in wanted}
            below = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
            if surplus := [name for name in below if name not in wanted and name.partition(".")[0] in parts]:
                raise InputError(
                    f"{path} holds another network: it has {surplus[0]} and {len(surplus) - 1} more entries that this backbone lacks. Set "
                    "backbone.name to what it was made with."
                )
            return {name: weights[prefix + name] for name in wanted}
    raise InputError(
        f"{path} does not hold this backbone: no prefix gives all its {len(wanted)} entries ({first}, ...). "
        f"It holds {len(weights)} tensors, for example {', '.join(list(weights)[:3])}."
    )
