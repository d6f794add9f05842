"""What a run of stage two starts from, learns and leaves: frozen backbones, rates by layer, and the weights that are judged."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modicum.checkpoint import Preprocessing, load_backbone, load_classifier, save_backbone
from modicum.config import load_experiment
from modicum.data.images import Images
from modicum.errors import InputError
from modicum.finetune.propagated_head import propagated_head
from modicum.finetune.propagation import Propagation
from modicum.finetune.run import optimizer_groups, same, train
from modicum.finetune.semi_supervised import KINDS, SemiSupervised
from modicum.finetune.variants import variants
from modicum.method import Facts, Progress, find_method
from modicum.networks import Backbone, create_backbone
from modicum.networks.backbones import choose_architecture
from modicum.optim import build_optimizer, parameter_groups
from modicum.record import Metrics
from modicum.resolve import resolve
from modicum.settings import BackboneSettings, FinetuneSettings, OptimizerSettings, TeacherSettings

FIXMATCH = "finetune.method={name: fixmatch, threshold: 0.1, teacher: {norm: %s, momentum: 0.9}}"
SMALL = ["finetune.steps=4", "finetune.warm_start=none", "finetune.finish=none"]


class Normed(nn.Module):
    """A backbone of one layer and batch norm."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1))


def sample(seed: int, size: int) -> Any:
    views = torch.randn(2, size, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    places = torch.arange(size)
    return SimpleNamespace(view=lambda number: views[number], labels=places % 3, rows=places, positions=places)


@pytest.mark.parametrize("norm", ["none", "bn", "eman"])
def test_three_kinds_of_weights_are_averages_of_the_students(norm: str) -> None:
    """Weights are averaged in ema and eman, norm statistics in eman alone, step by step from those of the first batch on."""
    teacher: Any = norm if norm == "none" else TeacherSettings(norm=norm, momentum=0.9)
    torch.manual_seed(0)
    kind = find_method("finetune", "fixmatch")
    method: Any = kind(Normed(), Facts(8, 3, 2, 10, 4, ema_momentum=0.9), threshold=0.1, teacher=teacher)  # type: ignore[call-arg]
    assert isinstance(method, SemiSupervised)
    optimizer = build_optimizer(
        OptimizerSettings(name="sgd", lr=0.5, weight_decay=0.0, momentum=0.0, nesterov=False), parameter_groups([(method, 1.0)], 0.0)
    )
    method.train()
    method.prepare({"labelled": sample(0, 4), "unlabelled": sample(1, 8)})
    averaged = {name: value.double() for name, value in method.student.state_dict().items()}
    for number in range(3):
        method({"labelled": sample(2 * number, 4), "unlabelled": sample(2 * number + 1, 8)}).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(number + 1, 10))
        averaged = {name: 0.9 * averaged[name] + 0.1 * value.double() for name, value in method.student.state_dict().items()}
    found = {kind: method.classifier(kind).state_dict() for kind in KINDS}
    for name, student in method.student.state_dict().items():
        statistic = name in dict(method.student.named_buffers())
        assert torch.equal(found["student"][name], student)
        if name.endswith("num_batches_tracked"):
            assert all(torch.equal(found[kind][name], student) for kind in KINDS)
            continue
        torch.testing.assert_close(found["eman"][name], averaged[name].float())
        torch.testing.assert_close(found["ema"][name], student if statistic else averaged[name].float())
    own = method.average_kind
    assert own == ("eman" if norm == "eman" else "ema")
    if norm == "eman":
        assert same(method.classifier("eman"), method.average.network)


@pytest.fixture(scope="module")
def start(digits: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone that has seen some images."""
    folder = tmp_path_factory.mktemp("start") / "backbone"
    experiment = load_experiment("digits")
    backbone = create_backbone(experiment.backbone, 1, 12, seed=0)
    backbone(torch.randn(16, 1, 12, 12))
    save_backbone(folder, backbone, Preprocessing(12, 1, (0.3,), (0.3,)))
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("norm", "export"), [("eman", "auto"), ("bn", "auto"), ("eman", "student")])
def test_the_settings_say_which_weights_are_exported_and_the_others_lie_beside(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, start: Path, norm: str, export: str
) -> None:
    session = session_of(digits, tmp_path, FIXMATCH % norm, f"finetune.init={start}", f"finetune.export={export}")
    main, *baselines = variants(session)
    train(session, main)
    own = {"eman": "eman", "bn": "ema"}[norm] if export == "auto" else export
    assert session.experiment.finetune.export == own
    folder = tmp_path / "finetune"
    assert {entry.name for entry in (folder / "weights").iterdir()} == set(KINDS) - {own}
    found = {own: weights(folder / "classifier")} | {kind: weights(folder / "weights" / kind) for kind in set(KINDS) - {own}}
    assert torch.equal(found["ema"]["fc.weight"], found["eman"]["fc.weight"])
    assert torch.equal(found["ema"]["bn1.running_mean"], found["student"]["bn1.running_mean"])
    assert not torch.equal(found["ema"]["bn1.running_mean"], found["eman"]["bn1.running_mean"])
    assert not torch.equal(found["ema"]["fc.weight"], found["student"]["fc.weight"])
    state = torch.load(folder / "state.pt", weights_only=True)["method"]
    assert torch.equal(state["student.head.weight"], found["student"]["fc.weight"])
    assert torch.equal(state["average.network.head.weight"], found["eman"]["fc.weight"])
    train(session, baselines[0])
    assert not (baselines[0].folder / "weights").exists()


@pytest.mark.parametrize("finish", ["propagate", "average"])
def test_a_head_fitted_after_the_last_step_stands_on_the_exported_backbone_and_the_trained_ones_lie_beside(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, start: Path, finish: str
) -> None:
    session = session_of(digits, tmp_path, FIXMATCH % "eman", f"finetune.init={start}", f"finetune.finish={finish}")
    main, *baselines = variants(session)
    assert {baseline.finish for baseline in baselines} == {"none"}
    train(session, main)
    folder = tmp_path / "finetune"
    exported, trained = weights(folder / "classifier"), {kind: weights(folder / "weights" / kind) for kind in KINDS}
    head = {"fc.weight", "fc.bias"}
    assert {name for name, value in exported.items() if not torch.equal(value, trained["eman"][name])} == head
    backbone, _ = load_backbone(folder / "backbone")
    own = load_classifier(folder / "weights" / "eman")[0].head if finish == "average" else None
    weight, bias, figures = propagated_head(session, backbone, main.labelled, Propagation(), own)
    assert torch.equal(exported["fc.weight"], weight.float())
    assert torch.equal(exported["fc.bias"], bias.float())
    rows = Metrics.read(folder / "metrics.csv")
    assert [row for row in rows if row[0] > 4] == [(5, "propagated_label_accuracy", figures["propagated_label_accuracy"])]
    before = (folder / "metrics.csv").read_bytes()
    train(session, main)  # as after a kill just before the classifier was written
    assert (folder / "metrics.csv").read_bytes() == before
    assert all(torch.equal(value, exported[name]) for name, value in weights(folder / "classifier").items())


@pytest.mark.parametrize(
    ("setting", "norm"), [("freeze_backbone=true", "eman"), ("freeze_backbone=true", "bn"), ("backbone_lr_scale=0", "bn")]
)
def test_a_frozen_backbone_stays_as_it_is_to_the_last_bit_and_the_head_learns(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, start: Path, setting: str, norm: str
) -> None:
    """Statistics too, although validation images are read in between, and in the teacher as well."""
    scale = [] if "scale" in setting else ["finetune.backbone_lr_scale=1"]
    session = session_of(digits, tmp_path, FIXMATCH % norm, f"finetune.init={start}", "finetune.labels=200", f"finetune.{setting}", *scale)
    main, from_random, *_ = variants(session)
    train(session, main)
    assert any(name == "validation_accuracy" for _, name, _ in Metrics.read(tmp_path / "finetune" / "metrics.csv"))
    before, head = weights(start), weights(tmp_path / "finetune" / "classifier")["fc.weight"]
    folders = [tmp_path / "finetune" / name for name in ("classifier", "backbone", "weights/student")]
    for after in map(weights, folders):
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(head, weights(folders[-1])["fc.weight"])
    state = torch.load(tmp_path / "finetune" / "state.pt", weights_only=True)
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == 2  # weight and bias of the head
    assert (from_random.title, from_random.init) == ("baseline random", None)
    train(session, from_random)  # has a whole network to learn
    other = weights(from_random.folder / "backbone")
    assert not any(torch.equal(other[name], value) for name, value in before.items() if name.endswith("conv1.weight"))
    state = torch.load(from_random.folder / "state.pt", weights_only=True)
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) > 2


def test_the_baseline_from_random_weights_learns_at_one_rate(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, start: Path
) -> None:
    """A backbone that knows nothing has nothing that a lower rate could keep: with it the baseline would be too easy to beat."""
    session = session_of(digits, tmp_path, f"finetune.init={start}", "finetune.backbone_lr_scale=0.1")
    main, from_random, from_backbone, *_ = variants(session)
    assert (main.init, from_random.init, from_backbone.init) == (str(start), None, str(start))
    for variant, scales in ((from_random, {1.0}), (from_backbone, {1.0, 0.1})):
        train(session, variant)
        groups = torch.load(variant.folder / "state.pt", weights_only=True)["optimizer"]["param_groups"]
        assert {group["scale"] for group in groups} == scales


def test_a_frozen_backbone_has_no_gradient_and_ignores_training_mode(start: Path) -> None:
    backbone = create_backbone(load_experiment("digits").backbone, 1, 12, seed=0)
    backbone.freeze()
    copied = copy.deepcopy(backbone)
    for network in (backbone, copied):
        network.train()
        nn.Sequential(network, nn.Linear(backbone.num_features, 2)).train()
        assert not any(module.training for module in network.modules())
        assert not network(torch.randn(4, 1, 12, 12)).requires_grad


def transformer() -> Backbone:
    architecture = choose_architecture(BackboneSettings(name="vit_tiny_patch16_224"), 1, 16)
    return Backbone(replace(architecture, arguments={**architecture.arguments, "depth": 3, "embed_dim": 24}))


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (transformer, ["pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "blocks.2.attn.proj.weight"]),
        (
            lambda: create_backbone(BackboneSettings(), 1, 16, 0),
            ["conv1.weight", "layer1.0.conv1.weight", "layer2.0.bn1.weight", "layer3.0.conv1.weight", "layer4.0.conv2.weight"],
        ),
    ],
)
def test_each_layer_has_its_share_of_the_learning_rate_of_the_next(build: Any, layers: list[str]) -> None:
    method: Any = find_method("finetune", "supervised")(build(), Facts(8, 3, 16, 10, 4))
    optimizer = OptimizerSettings(name="adamw", lr=0.1, weight_decay=0.05, momentum=0.0, nesterov=False)
    groups = optimizer_groups(method, FinetuneSettings(layer_decay=0.5, backbone_lr_scale=0.3, optimizer=optimizer))
    scales = {parameter: (group["scale"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scales) == len(list(method.student.parameters()))  # each once
    assert groups[0]["scale"] == scales[method.student.head.bias][0] == 1
    named = dict(method.student.backbone.network.named_parameters())
    for at, name in enumerate(reversed(layers)):
        assert scales[named[name]] == (pytest.approx(0.3 * 0.5**at), 0.05 if named[name].ndim > 1 else 0.0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["finetune.freeze_backbone=true", "finetune.init=random"], "freeze_backbone leaves finetune.init = random as it was drawn"),
        (
            ["finetune.freeze_backbone=true", "finetune.backbone_lr_scale=1", "finetune.layer_decay=0.7"],
            "layer_decay = 0.7 would do nothing",
        ),
        (["finetune.freeze_backbone=true", "finetune.backbone_lr_scale=0.5"], "backbone_lr_scale = 0.5 would do nothing"),
        (["finetune.layer_decay=1.5"], "layer_decay = 1.5 is not possible"),
        (["finetune.layer_decay=0.7", "backbone.name=test_without_layers"], "timm does not say what the layers"),
    ],
)
def test_a_rate_that_nothing_would_have_is_refused(
    digits: Images, monkeypatch: pytest.MonkeyPatch, overrides: list[str], sentence: str
) -> None:
    if "backbone.name" in overrides[-1]:
        monkeypatch.setattr("modicum.refusals.names_layers", lambda architecture: False)
        overrides = overrides[:-1]
    with pytest.raises(InputError, match=sentence):
        resolve(load_experiment("digits", overrides), digits)
