"""Backbones by name, stems for small images, and their way out of the house and back."""

import json
import subprocess
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from modicum.checkpoint import Preprocessing, load_backbone, load_classifier, save_backbone, save_classifier
from modicum.errors import InputError
from modicum.exchange import initial_backbone
from modicum.networks import Backbone, Classifier, create_backbone, mlp
from modicum.networks.backbones import choose_architecture, keep_projector, kept_layer
from modicum.settings import BackboneSettings, Experiment

CASES = [
    ("resnet10_small", 16, 1),
    ("resnet10d_tiny", 16, 1),
    ("resnet14d_tiny", 28, 1),
    ("resnet18", 28, 1),
    ("resnet18", 64, 3),
    ("vit_tiny_patch16_224", 32, 3),
    ("mobilenetv3_small_050", 96, 3),
]


def images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def preprocessing(channels: int, size: int) -> Preprocessing:
    return Preprocessing(size, channels, (0.5,) * channels, (0.25,) * channels)


@cache
def backbone_of(name: str, size: int, channels: int) -> Backbone:
    """Drawing millions of weights takes longer than looking at them: once a case, for tests that leave them as they are."""
    return create_backbone(BackboneSettings(name=name), channels, size, seed=3).eval()


@pytest.mark.parametrize(("name", "size", "channels"), CASES)
def test_backbones_give_features_of_the_stated_size(name: str, size: int, channels: int) -> None:
    backbone = backbone_of(name, size, channels)
    assert backbone(images(2, channels, size)).shape == (2, backbone.num_features)


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_small_images_keep_their_resolution_in_the_stem(name: str) -> None:
    small = create_backbone(BackboneSettings(name=name), 3, 32, seed=0).network
    large = create_backbone(BackboneSettings(name=name), 3, 224, seed=0).network
    assert small.conv1(images(1, 3, 32)).shape[-1] == 32
    assert isinstance(small.maxpool, torch.nn.Identity)
    assert large.conv1(images(1, 3, 224)).shape[-1] == 112


def test_a_network_that_takes_no_smaller_patches_keeps_its_own() -> None:
    settings = BackboneSettings(name="mixer_s16_224")
    assert choose_architecture(settings, 3, 32).arguments == {"img_size": 32}
    with pytest.raises(InputError, match=r"use backbone\.stem=standard, or a vision transformer"):
        choose_architecture(BackboneSettings(name="mixer_s16_224", stem="small"), 3, 32)


def test_a_transformer_takes_views_smaller_than_its_images() -> None:
    backbone = create_backbone(BackboneSettings(name="vit_tiny_patch16_224"), 1, 16, seed=0)
    assert backbone(images(2, 1, 8)).shape == (2, backbone.num_features)
    assert backbone.drop_paths(0.1)
    assert backbone(images(2, 1, 8)).shape == (2, backbone.num_features)


@pytest.mark.parametrize(
    ("name", "size"), [("vgg11", 12), ("dla34", 12), ("nest_tiny", 12), ("gcvit_xtiny", 12), ("vit_tiny_patch16_224", 100)]
)
def test_a_network_that_makes_nothing_of_images_of_a_size_is_refused(name: str, size: int) -> None:
    with pytest.raises(InputError, match=rf"^backbone\.name = '{name}' .* of {size} px: choose a larger data\.image_size, or one that"):
        choose_architecture(BackboneSettings(name=name), 3, size)
    assert choose_architecture(BackboneSettings(name=name), 3, 64)


def test_the_seed_alone_draws_the_weights() -> None:
    torch.manual_seed(5)
    weights = [create_backbone(BackboneSettings(), 1, 16, seed).network.conv1.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_unknown_architecture_and_an_unknown_stem_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean resnet18"):
        create_backbone(BackboneSettings(name="resnet19"), 3, 32, seed=0)
    with pytest.raises(InputError, match=r"stem=standard"):
        create_backbone(BackboneSettings(name="vgg11", stem="small"), 3, 32, seed=0)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
def test_an_architecture_of_two_classifiers_is_refused_before_it_is_trained(name: str) -> None:
    with pytest.raises(InputError, match=rf"^backbone\.name = '{name}' is not possible: it has two classifiers"):
        choose_architecture(BackboneSettings(name=name), 3, 224)


def test_an_architecture_that_names_its_classifier_only_where_it_has_one_is_known() -> None:
    assert choose_architecture(BackboneSettings(name="efficientvit_m0"), 3, 224).name == "efficientvit_m0"


STRANGER = """
import sys
sys.modules["modicum"] = None  # an import of it raises
import os, pathlib
import numpy, torch
for folder in map(pathlib.Path, sys.argv[1:]):
    os.chdir(folder)
    names = {}
    exec(pathlib.Path("block.py").read_text(), names)
    found = next(value for value in names.values() if isinstance(value, torch.nn.Module))
    numpy.save("features.npy", found(torch.from_numpy(numpy.load("images.npy"))).detach().numpy())
"""


@pytest.fixture(scope="module")
def loaded_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder a case, with the features that its README's lines gave in another interpreter: one for all, since it starts slowly."""
    folders = [tmp_path_factory.mktemp(name) for name, _, _ in CASES]
    for folder, (name, size, channels) in zip(folders, CASES, strict=True):
        save_backbone(folder, backbone_of(name, size, channels), preprocessing(channels, size))
        np.save(folder / "images.npy", images(2, channels, size).numpy())
        block = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert "modicum" not in block
        (folder / "block.py").write_text(block)
    subprocess.run([sys.executable, "-c", STRANGER, *folders], cwd=folders[0], check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    return folders


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_readmes_lines_load_the_backbone_where_modicum_cannot_be_imported(
    loaded_elsewhere: list[Path], case: tuple[str, int, int]
) -> None:
    _, size, channels = case
    expected = backbone_of(*case)(images(2, channels, size)).detach().numpy()
    np.testing.assert_allclose(np.load(loaded_elsewhere[CASES.index(case)] / "features.npy"), expected, atol=1e-5)


def test_timm_loads_a_standard_backbone_by_itself(tmp_path: Path) -> None:
    backbone = create_backbone(BackboneSettings(name="resnet10_small", stem="standard"), 1, 64, seed=3).eval()
    save_backbone(tmp_path, backbone, preprocessing(1, 64))
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(network(images(2, 1, 64)), backbone(images(2, 1, 64)))
    assert network.pretrained_cfg["mean"] == [0.5]


def test_timm_loads_a_classifier_that_is_a_convolution_with_it(tmp_path: Path) -> None:
    classifier = Classifier(create_backbone(BackboneSettings(name="dla46_c", stem="standard"), 3, 64, seed=3), 5).eval()
    save_classifier(tmp_path, classifier, preprocessing(3, 64), tuple("abcde"))
    network, again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), load_classifier(tmp_path)[0]
    for loaded in (network, again):
        torch.testing.assert_close(loaded(images(2, 3, 64)), classifier(images(2, 3, 64)))


def test_the_number_of_features_is_what_the_classifier_gets(tmp_path: Path) -> None:
    backbone = create_backbone(BackboneSettings(name="mobilenetv3_small_050", stem="standard"), 3, 64, seed=3).eval()
    save_backbone(tmp_path, backbone, preprocessing(3, 64))
    assert json.loads((tmp_path / "config.json").read_text())["num_features"] == backbone(images(2, 3, 64)).shape[1]


@pytest.mark.parametrize(("name", "size", "channels"), CASES)
def test_backbone_and_classifier_come_back_as_they_went(tmp_path: Path, name: str, size: int, channels: int) -> None:
    classifier = Classifier(backbone_of(name, size, channels), 3).eval()
    save_classifier(tmp_path, classifier, preprocessing(channels, size), ("a", "b", "<c>"))
    again, how, names = load_classifier(tmp_path)
    x = images(2, channels, size)
    torch.testing.assert_close(again(x), classifier(x))
    assert (how, names) == (preprocessing(channels, size), ("a", "b", "<c>"))
    backbone, _ = load_backbone(tmp_path)
    torch.testing.assert_close(backbone(x), classifier.backbone(x))


def experiment(name: str = "resnet10_small") -> Experiment:
    return Experiment.model_validate({"backbone": {"name": name}, "data": {"image_size": 16, "channels": 1}})


@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "backbone."])
def test_a_foreign_checkpoint_is_read_under_any_prefix(tmp_path: Path, prefix: str) -> None:
    given = create_backbone(BackboneSettings(), 1, 16, seed=9)
    state = {f"{prefix}{key}": value for key, value in given.network.state_dict().items()} | {"queue": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "their.pth")
    backbone = initial_backbone(str(tmp_path / "their.pth"), experiment())
    assert torch.equal(backbone.network.conv1.weight, given.network.conv1.weight)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_timm_wrote_is_a_start(tmp_path: Path, safe: bool) -> None:
    given = timm.create_model("resnet18", in_chans=1, num_classes=7)
    timm.models.save_for_hf(given, str(tmp_path), safe_serialization=safe)
    settings = Experiment.model_validate({"backbone": {"name": "resnet18", "stem": "standard"}, "data": {"image_size": 16, "channels": 1}})
    backbone = initial_backbone(str(tmp_path), settings)
    for name, value in backbone.network.state_dict().items():
        assert torch.equal(value, given.state_dict()[name])
    with pytest.raises(InputError, match="does not"):
        initial_backbone(str(tmp_path), experiment())


def test_what_other_projects_save_of_their_command_line_does_not_hide_the_weights(tmp_path: Path) -> None:
    given = create_backbone(BackboneSettings(), 1, 16, seed=9)
    torch.save({"model": given.network.state_dict(), "args": Namespace(lr=0.1, arch="resnet10")}, tmp_path / "their.pth")
    assert torch.equal(initial_backbone(str(tmp_path / "their.pth"), experiment()).network.conv1.weight, given.network.conv1.weight)


def test_a_deeper_network_of_the_same_kind_is_not_cut_to_size(tmp_path: Path) -> None:
    """A ResNet-34 holds every entry of a ResNet-18, and other features."""
    deeper = timm.create_model("resnet34", in_chans=1, num_classes=7)
    torch.save(deeper.state_dict(), tmp_path / "their.pth")
    settings = Experiment.model_validate({"backbone": {"name": "resnet18", "stem": "standard"}, "data": {"image_size": 16, "channels": 1}})
    with pytest.raises(InputError, match=r"another network: it has layer1\.2\.conv1\.weight and 95 more"):
        initial_backbone(str(tmp_path / "their.pth"), settings)


def test_a_checkpoint_without_the_backbone_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.stem.weight": torch.zeros(3)}}, tmp_path / "their.pth")
    with pytest.raises(InputError, match=r"visual\.stem\.weight"):
        initial_backbone(str(tmp_path / "their.pth"), experiment())


def test_a_backbone_that_does_not_fit_the_config_is_refused(tmp_path: Path) -> None:
    save_backbone(tmp_path, create_backbone(BackboneSettings(), 1, 16, seed=0), preprocessing(1, 16))
    with pytest.raises(InputError, match="does not fit the config"):
        initial_backbone(str(tmp_path), experiment("resnet18"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        initial_backbone(str(tmp_path), experiment())


def with_projector(name: str, size: int, channels: int) -> Backbone:
    torch.manual_seed(0)
    backbone = backbone_of(name, size, channels)
    return keep_projector(backbone, kept_layer(backbone.num_features, 24)).eval()


@pytest.mark.parametrize(("name", "size", "channels"), [("resnet10_small", 16, 1), ("vit_tiny_patch16_224", 32, 3)])
def test_a_projectors_layer_stays_under_the_classifier(tmp_path: Path, name: str, size: int, channels: int) -> None:
    backbone, x = with_projector(name, size, channels), images(2, channels, size)
    classifier = Classifier(backbone, 3).eval()
    assert backbone(x).shape == (2, 24)
    save_classifier(tmp_path, classifier, preprocessing(channels, size), ("a", "b", "c"))
    torch.testing.assert_close(load_classifier(tmp_path)[0](x), classifier(x))
    torch.testing.assert_close(load_backbone(tmp_path)[0](x), backbone(x))
    names: dict[str, object] = {}
    block = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(block.replace('"model.safetensors"', repr(str(tmp_path / "model.safetensors"))), names)  # the lines for a stranger
    torch.testing.assert_close(names["network"](x), classifier(x))  # type: ignore[operator]


def test_a_projectors_layer_lies_beside_the_backbone_for_a_stage_two_that_keeps_it(tmp_path: Path) -> None:
    backbone = backbone_of("resnet10_small", 16, 1)
    projector, x = mlp(backbone.num_features, 24, 8, num_layers=3, norm=True).eval(), images(2, 1, 16)
    save_backbone(tmp_path / "with", backbone, preprocessing(1, 16), projector)
    assert initial_backbone(str(tmp_path / "with"), experiment()).num_features == backbone.num_features
    kept = initial_backbone(str(tmp_path / "with"), experiment(), projector_layers=1).eval()
    torch.testing.assert_close(kept(x), projector[:3](backbone(x)))
    save_backbone(tmp_path / "again", kept, preprocessing(1, 16))  # as stage two leaves it
    torch.testing.assert_close(initial_backbone(str(tmp_path / "again"), experiment(), projector_layers=1).eval()(x), kept(x))
    with pytest.raises(InputError, match="it has projector 24 for 0"):
        initial_backbone(str(tmp_path / "again"), experiment())
    save_backbone(tmp_path / "without", backbone, preprocessing(1, 16))
    with pytest.raises(InputError, match=r"has no projector\.safetensors, so finetune\.projector_layers must be 0"):
        initial_backbone(str(tmp_path / "without"), experiment(), projector_layers=1)
    assert initial_backbone(None, experiment(), projector_layers=1).num_features == backbone.num_features  # the baseline from nothing
