"""Norm over all ranks as a layer, and the leak that norm policies are for. What two ranks compute: test_distributed.py."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from modicum import distributed
from modicum.checkpoint import Preprocessing, save_backbone
from modicum.method import Facts, Progress, find_method
from modicum.networks import create_backbone
from modicum.networks.norms import GroupedBatchNorm, SyncBatchNorm, replace_norms
from modicum.settings import BackboneSettings, TeacherSettings
from modicum.teacher import Teacher, in_groups

NORMS = [nn.BatchNorm1d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), BatchNormAct2d(6, act_layer=nn.SiLU)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ranks_that_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer takes the path of several ranks, of which this one has all images."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda tensor: tensor)


@pytest.mark.parametrize("norm", NORMS, ids=["1d", "2d", "without affine", "with activation"])
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_gathered_moments_give_the_batch_norm_of_one_process(
    norm: nn.Module, kind: torch.dtype, tolerance: float, ranks_that_are_one: None
) -> None:
    given = nn.Sequential(copy.deepcopy(norm))
    ours = copy.deepcopy(given)
    replace_norms(ours, SyncBatchNorm)
    for seed in range(2):
        x = (3 + 2 * draw(*((8, 6) if isinstance(norm, nn.BatchNorm1d) else (8, 6, 5, 4)), seed=seed)).to(kind)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [network(images) for network, images in zip((given, ours), inputs, strict=True)]
        for output in outputs:
            (output * draw(*x.shape, seed=9)).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)  # of the same type, too
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=tolerance, atol=tolerance)
    assert given.state_dict().keys() == ours.state_dict().keys()
    for name, value in given.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS, ids=["1d", "2d", "without affine", "with activation"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_a_grouped_norm_is_as_many_calls_with_a_part_each(
    norm: nn.Module, compiled: bool, tracked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = nn.Sequential(copy.deepcopy(norm))
    ours = copy.deepcopy(given)
    replace_norms(ours, GroupedBatchNorm)
    given[0].track_running_stats = ours[0].track_running_stats = tracked  # type: ignore[assignment]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    for seed in range(2):
        x = 3 + 2 * draw(*((12, 6) if isinstance(norm, nn.BatchNorm1d) else (12, 6, 5, 4)), seed=seed)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        outputs = [torch.cat([given(part) for part in inputs[0].chunk(3)]), in_groups(ours, inputs[1], 3)]
        for output in outputs:
            (output * draw(*x.shape, seed=9)).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5)
    for name, value in given.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), given(x), rtol=1e-5, atol=1e-5)  # no groups outside of `in_groups`
    torch.testing.assert_close(ours.eval()(x), given.eval()(x))


def test_torchs_own_layer_for_gpus_takes_ours_for_its_own() -> None:
    ours, x = SyncBatchNorm(nn.BatchNorm2d(6)), draw(8, 6, 5, 4)
    assert torch.equal(nn.SyncBatchNorm.forward(ours, x), nn.BatchNorm2d(6)(x))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet10_small", "mobilenetv3_small_050"])
def test_on_one_process_and_when_exported_it_is_plain_batch_norm(tmp_path: Path, name: str) -> None:
    plain = create_backbone(BackboneSettings(name=name, stem="standard"), 3, 64, seed=0)
    ours, images = copy.deepcopy(plain), draw(4, 3, 64, 64)
    before = [id(parameter) for parameter in ours.parameters()]
    replace_norms(ours, SyncBatchNorm)
    assert [id(parameter) for parameter in ours.parameters()] == before
    assert not any(type(module).__name__.startswith("BatchNorm") for module in ours.modules())
    assert torch.equal(ours(images), plain(images))
    save_backbone(tmp_path, ours, Preprocessing(64, 3, (0.5,) * 3, (0.25,) * 3))
    elsewhere = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(elsewhere(images), plain.eval()(images))


def test_the_setting_reaches_every_batch_norm_of_a_method() -> None:
    facts = Facts(64, 10, 16, 100, 16, norm="sync_bn")
    for name, settings in (
        ("simclr", {"temperature": 0.5}),
        ("byol", {"hidden_size": 8, "teacher": TeacherSettings(norm="bn", momentum=0.9)}),
    ):
        method = find_method("pretrain", name).from_settings(create_backbone(BackboneSettings(), 1, 16, 0), facts, 0, settings)
        norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) > 9
        assert all(isinstance(module, SyncBatchNorm) for module in norms)


class Cheat(nn.Module):
    """Sees nothing of its image: an image less its normalised self is the mean of the batch that normalised it, the same for all."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(self.num_features, eps=1e6, affine=False)  # so that it subtracts the mean and hardly divides
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * (images - self.norm(images) * self.norm.eps**0.5)


class Step:
    """Two views (B, D) of images that are new at every step."""

    def __init__(self, number: int, size: int = 16) -> None:
        images = draw(size, Cheat.num_features, seed=number)
        self.views = [images + 0.01 * draw(*images.shape, seed=10_000 + 2 * number + view) for view in (0, 1)]
        self.order = torch.randperm(size, generator=torch.Generator().manual_seed(number))

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        return self.views[number] if order is None else self.views[number][order]

    def permutation(self) -> Tensor:
        return self.order


def loss_of_the_cheat(norm: str) -> float:
    """Its mean loss among 256 negatives, once they are keys of its own: log(257) = 5.55 is chance."""
    facts = Facts(num_images=10_000, num_classes=10, image_size=16, steps=100, batch_size=16)
    teacher = TeacherSettings(norm=norm, momentum=0.9, groups=4)
    settings = {"queue_size": 256, "embedding_size": 8, "temperature": 0.05, "teacher": teacher}
    method = find_method("pretrain", "moco_v2").from_settings(Cheat(), facts, 0, settings)  # type: ignore[arg-type]
    method.student = method.student[0]  # the projector could only blur what the cheat knows
    method.teacher = Teacher(method.student, teacher)
    losses = []
    for number in range(facts.steps):
        losses.append(method({"unlabelled": Step(number)}).total.detach())  # type: ignore[dict-item]
        method.after_step(Progress(number + 1, facts.steps))
    return float(torch.stack(losses[-50:]).mean())


@pytest.mark.parametrize("norm", ["bn", "sync_bn"])
def test_batch_statistics_alone_solve_the_contrastive_task(norm: str) -> None:
    assert loss_of_the_cheat(norm) < 0.5


@pytest.mark.parametrize("norm", ["shuffle_bn", "eman"])
def test_shuffling_and_averaged_statistics_stop_the_cheat(norm: str) -> None:
    assert loss_of_the_cheat(norm) > 0.8 * math.log(257)
