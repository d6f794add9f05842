"""Weights to start from, or to predict with, that are damaged, foreign or malign: one sentence, nothing run, nothing made."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from modicum.checkpoint import Preprocessing, load_classifier, load_projector, save_backbone, save_classifier
from modicum.errors import InputError
from modicum.exchange import initial_backbone
from modicum.networks import Classifier, create_backbone, mlp
from modicum.session import make_request, open_session
from modicum.settings import BackboneSettings, Experiment

EXPERIMENT = Experiment.model_validate({"backbone": {"name": "resnet10_tiny"}, "data": {"image_size": 16, "channels": 1}})
PREPROCESSING = Preprocessing(16, 1, (0.5,), (0.25,))
BACKBONE = create_backbone(BackboneSettings(name="resnet10_tiny"), 1, 16, seed=0)
WEIGHTS = {name: value.clone() for name, value in BACKBONE.network.state_dict().items()}


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncated(path: Path) -> None:
    torch.save(WEIGHTS, path)
    cut(path)


FILES: dict[str, Callable[[Path], object]] = {
    "truncated.safetensors": lambda path: path.write_bytes(save(WEIGHTS)[:-100]),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "junk.safetensors": lambda path: path.write_bytes(bytes(range(256))),
    "truncated.pth": truncated,
    "empty.pth": lambda path: path.write_bytes(b""),
    "text.pth": lambda path: path.write_text("hello, this is text\n"),
    "junk.pth": lambda path: path.write_bytes(bytes(range(256))),
    "code.pth": lambda path: torch.save({"state_dict": WEIGHTS, "args": Evil(path.parent / "marker")}, path),
    "code.pkl": lambda path: path.write_bytes(pickle.dumps(Evil(path.parent / "marker"))),
    "module.pth": lambda path: torch.save(nn.Linear(2, 2), path),
    "list.pth": lambda path: torch.save(list(WEIGHTS.values()), path),
    "tensor.pth": lambda path: torch.save(torch.zeros(3), path),
    "numbered.pth": lambda path: torch.save(dict(enumerate(WEIGHTS.values())), path),
    "without.pth": lambda path: torch.save({"epoch": 7}, path),
    "meta.pth": lambda path: torch.save({name: value.to("meta") for name, value in WEIGHTS.items()}, path),
}


def refused(path: Path, sentence: str, load: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{sentence}") as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert "delete it" not in message  # it is somebody's
    assert " ()" not in message
    assert "weights_only" not in message  # torch's advice to run the code
    assert not list(path.parent.rglob("marker"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_damaged_or_something_else_is_named(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    refused(
        tmp_path / name, "cannot be read as a (checkpoint|safetensors file): ", lambda: initial_backbone(str(tmp_path / name), EXPERIMENT)
    )


@pytest.mark.parametrize("name", ["code.pth", "module.pth", "truncated.pth"])
def test_a_damaged_file_in_a_folder_that_timm_wrote_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "num_classes": 0}))
    FILES[name](tmp_path / "pytorch_model.bin")
    refused(tmp_path / "pytorch_model.bin", "cannot be read as a checkpoint: ", lambda: initial_backbone(str(tmp_path), EXPERIMENT))


def configured(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return write


def runs_a_pickle(folder: Path) -> None:
    torch.save(Evil(folder / "marker"), folder / "evil.pth")
    configured(lambda config: config["modicum"]["architecture"]["arguments"].update(checkpoint_path=str(folder / "evil.pth")))(folder)


FOLDERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights truncated": ("", lambda folder: cut(folder / "model.safetensors")),
    "weights empty": ("", lambda folder: (folder / "model.safetensors").write_bytes(b"")),
    "config truncated": ("", lambda folder: cut(folder / "config.json")),
    "config a list": ("it is a list", lambda folder: (folder / "config.json").write_text('["modicum"]')),
    "config not UTF-8": ("utf-8", lambda folder: (folder / "config.json").write_bytes(b'{"modicum": "\xff"}')),
    "no number of classes": ("there is no 'num_classes'", configured(lambda config: config.pop("num_classes"))),
    "no preprocessing": ("there is no 'pretrained_cfg'", configured(lambda config: config.pop("pretrained_cfg"))),
    "no architecture": ("there is no 'architecture'", configured(lambda config: config["modicum"].pop("architecture"))),
    "modicum a number": ("", configured(lambda config: config.update(modicum=3))),
    "architecture with more": ("depth", configured(lambda config: config["modicum"]["architecture"].update(depth=3))),
    "architecture unknown": ("'resnet19'", configured(lambda config: config["modicum"]["architecture"].update(name="resnet19"))),
    "architecture of a hub": ("'hf-hub:a/b'", configured(lambda config: config["modicum"]["architecture"].update(name="hf-hub:a/b"))),
    "architecture that cannot be": ("", configured(lambda config: config["modicum"]["architecture"].update(channels="one"))),
    "architecture with a pickle": ("checkpoint_path", runs_a_pickle),
    "means of other channels": ("2 means", configured(lambda config: config["pretrained_cfg"].update(mean=[0.5, 0.5]))),
    "means that are words": ("'half'", configured(lambda config: config["pretrained_cfg"].update(mean=["half"]))),
}
CLASSES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no names": ("there is no 'label_names'", configured(lambda config: config.pop("label_names"))),
    "a name too few": ("2 label_names for num_classes = 3", configured(lambda config: config["label_names"].pop())),
    "two classifiers": (
        "it has two classifiers",
        configured(lambda config: config["modicum"]["architecture"].update(name="deit_tiny_distilled_patch16_224", arguments={}, stem={})),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_damaged_backbone_folder_is_named(tmp_path: Path, kind: str) -> None:
    save_backbone(tmp_path, BACKBONE, PREPROCESSING)
    reason, damage = FOLDERS[kind]
    damage(tmp_path)
    refused(tmp_path, f"cannot be read as a.*: .*{reason}", lambda: initial_backbone(str(tmp_path), EXPERIMENT))


@pytest.mark.parametrize("kind", [*FOLDERS, *CLASSES])
def test_a_damaged_classifier_folder_is_named(tmp_path: Path, kind: str) -> None:
    save_classifier(tmp_path, Classifier(BACKBONE, 3), PREPROCESSING, ("a", "b", "c"))
    reason, damage = {**FOLDERS, **CLASSES}[kind]
    damage(tmp_path)
    refused(tmp_path, f"cannot be read as a.*: .*{reason}", lambda: load_classifier(tmp_path))


def test_a_damaged_projector_is_named(tmp_path: Path) -> None:
    save_backbone(tmp_path, BACKBONE, PREPROCESSING, mlp(BACKBONE.num_features, 24, 8, num_layers=3, norm=True))
    (tmp_path / "projector.safetensors").write_bytes(save({"1.weight": torch.zeros(3)}))
    refused(tmp_path, "cannot be read as a projector: there is no '0.weight'", lambda: load_projector(tmp_path))
    cut(tmp_path / "projector.safetensors")
    refused(tmp_path, "cannot be read as a safetensors file", lambda: load_projector(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300, 1j])
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, value: complex) -> None:
    spoilt = {"layer1.0.bn1.running_var", "layer2.0.conv1.weight"}  # the first is named
    kind = torch.complex64 if isinstance(value, complex) else torch.float64
    state = {name: torch.full(v.shape, value, dtype=kind) if name in spoilt else v for name, v in WEIGHTS.items()}
    torch.save({"state_dict": state}, tmp_path / "their.pth")
    sentence = r"layer1\.0\.bn1\.running_var holds complex values, or values that are not finite"
    refused(tmp_path / "their.pth", sentence, lambda: initial_backbone(str(tmp_path / "their.pth"), EXPERIMENT))
    folder = tmp_path / "classifier"
    save_classifier(folder, Classifier(BACKBONE, 3), PREPROCESSING, ("a", "b", "c"))
    save_file(load_file(folder / "model.safetensors") | {name: state[name] for name in spoilt}, folder / "model.safetensors")
    refused(folder, sentence, lambda: load_classifier(folder))
    refused(folder, sentence, lambda: initial_backbone(str(folder), EXPERIMENT))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["truncated.safetensors", "code.pth", "list.pth", "folder"])
def test_a_damaged_start_is_refused_before_a_run_folder_is_made_or_cleared(tmp_path: Path, stage: str, name: str) -> None:
    if name == "folder":
        save_backbone(tmp_path / name, BACKBONE, PREPROCESSING)
        cut(tmp_path / name / "model.safetensors")
    else:
        FILES[name](tmp_path / name)
    fresh = make_request("digits", run=tmp_path / "run", init=str(tmp_path / name), init_stage=stage)
    with pytest.raises(InputError, match="cannot be read"), open_session(fresh):
        pass
    assert not (tmp_path / "run").exists()
    with open_session(make_request("digits", run=tmp_path / "run")):
        (tmp_path / "run" / stage).mkdir()
        (tmp_path / "run" / stage / "state.pt").write_text("a state")
    before = (tmp_path / "run" / "experiment.yaml").read_text()
    with pytest.raises(InputError, match="cannot be read"), open_session(fresh, force=True, again=stage):
        pass
    assert (tmp_path / "run" / "experiment.yaml").read_text() == before
    assert (tmp_path / "run" / stage / "state.pt").read_text() == "a state"


def test_a_damaged_teacher_is_refused_before_a_run_folder_is_made(tmp_path: Path) -> None:
    save_classifier(tmp_path / "teacher", Classifier(BACKBONE, 10), PREPROCESSING, tuple("0123456789"))
    cut(tmp_path / "teacher" / "model.safetensors")
    request = make_request("digits", [f"finetune.method={{name: distill, teacher_from: {tmp_path / 'teacher'}}}"], run=tmp_path / "run")
    with pytest.raises(InputError, match=r"teacher/model\.safetensors cannot be read"), open_session(request):
        pass
    assert not (tmp_path / "run").exists()
