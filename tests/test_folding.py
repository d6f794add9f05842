"""Folded batch norm gives the same outputs, follows its network, and keeps away from what cannot be folded."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from modicum.networks import create_backbone, mlp
from modicum.networks.folding import Folded, pairs
from modicum.settings import BackboneSettings, TeacherSettings
from modicum.teacher import Teacher


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def stirred(network: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics, scales and shifts that are not those it was made with."""
    draws = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                if tensor is not None:
                    tensor.data += 0.3 * torch.randn(tensor.shape, generator=draws)
            module.running_var.data *= 0.5 + torch.rand(module.running_var.shape, generator=draws)
    return network.eval()


def create_student(seed: int = 0) -> nn.Module:
    backbone = create_backbone(BackboneSettings(name="resnet10_tiny"), 1, 16, seed)
    return stirred(nn.Sequential(backbone, mlp(backbone.num_features, 32, 8, norm=True)))


def count_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize("name", ["ours", "efficientnet_b0", "mobilenetv3_small_050", "regnetx_002", "resnetv2_50", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_outputs_are_equal(name: str) -> None:
    size = {"img_size": 16, "patch_size": 4} if name.startswith("vit") else {}
    network = create_student() if name == "ours" else stirred(timm.create_model(name, in_chans=1, num_classes=0, **size))
    folded = Folded(network, images(), torch.float32)
    torch.testing.assert_close(folded(images(seed=3)), network(images(seed=3)), rtol=1e-3, atol=1e-4)


def test_no_norm_is_left_and_the_network_keeps_its_own() -> None:
    network = create_student()
    before = count_norms(network)
    folded = Folded(network, images(), torch.float32)
    assert len(folded.pairs) == before == count_norms(network) > 10
    assert count_norms(folded.copy) == 0


@torch.no_grad()
def test_it_follows_the_network_in_weights_and_statistics() -> None:
    network = create_student()
    folded = Folded(network, images(), torch.float32)
    before = folded(images())
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1.1)
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(folded(images()), before, rtol=1e-2)


class Shortcut(nn.Module):
    """What the convolution gives is read by the norm and by the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        return (x + self.norm(x)).mean((2, 3))


@torch.no_grad()
def test_a_layer_that_something_else_reads_is_left_alone() -> None:
    network = stirred(Shortcut())
    assert pairs(network, images()) == [("convolution", "norm")]
    folded = Folded(network, images(), torch.float32)
    assert folded.pairs == []
    torch.testing.assert_close(folded(images()), network(images()))


def test_a_network_that_cannot_compute_in_float64_is_left_alone() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    network = nn.Sequential(nn.Conv2d(1, 4, 3), Single(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    folded = Folded(network, images(), torch.float32)
    assert folded.pairs == []
    torch.testing.assert_close(folded(images()), network(images()))


def test_rounding_does_not_decide_what_is_folded() -> None:
    """A run that goes on would else fold where it did not, as GPUs, which round what they convolve, once made it."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        network[0].bias.fill_(1e6)  # beside which fp32 loses a tenth of what the convolution gives
        network[1].running_mean.fill_(1e6)
    assert Folded(network, images(), torch.float32).pairs == [("0", "1")]


def test_an_eman_teacher_is_folded_and_its_state_is_not() -> None:
    class Same:
        def view(self, number: int) -> Tensor:
            return images()

    teacher = Teacher(create_student(), TeacherSettings(norm="eman", momentum=0.9))
    names = list(teacher.state_dict())
    torch.testing.assert_close(teacher(Same(), 0), teacher.network(images()), rtol=1e-3, atol=1e-4)
    assert teacher.folded is not None
    assert teacher.folded.pairs
    assert list(teacher.state_dict()) == names
    other = copy.deepcopy(teacher)
    other.update(create_student(seed=5))
    torch.testing.assert_close(other(Same(), 0), other.network(images()), rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(teacher(Same(), 0).float(), teacher.network(images()).float(), rtol=0.1, atol=0.05)
    assert teacher.folded.dtype == torch.bfloat16
