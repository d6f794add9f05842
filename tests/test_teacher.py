"""The moving average: what each norm policy must do, and the mistakes others shipped."""

import copy

import pytest
import torch
from torch import Tensor, nn

from modicum.networks import create_backbone, mlp
from modicum.settings import BackboneSettings, TeacherSettings
from modicum.teacher import Teacher, in_groups, untouched_statistics


class Images:
    """A sample that is its images."""

    def __init__(self, images: Tensor, order: Tensor | None = None) -> None:
        self.images, self.order = images, order

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        return self.images if order is None else self.images[order]

    def permutation(self) -> Tensor:
        assert self.order is not None
        return self.order


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def student() -> nn.Module:
    backbone = create_backbone(BackboneSettings(), 1, 16, seed=0)
    network = nn.Sequential(backbone, mlp(backbone.num_features, 32, 8, norm=True))
    for seed in range(3):
        network(random_images(16, seed))  # running statistics of its own
    return network


def moved(network: nn.Module) -> nn.Module:
    """Another student some steps later: other parameters, other statistics."""
    later = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    for seed in range(3):
        later(2 + 3 * random_images(16, 10 + seed))
    return later


@pytest.mark.parametrize("norm", ["eman", "bn"])
def test_parameters_and_statistics_are_averaged_and_integers_copied(norm: str) -> None:
    first = student()
    later = moved(first)
    teacher = Teacher(first, TeacherSettings(norm=norm, momentum=0.9))
    teacher.update(later)
    average, start, end = teacher.network.state_dict(), first.state_dict(), later.state_dict()
    for name, value in average.items():
        expected = 0.9 * start[name] + 0.1 * end[name] if value.is_floating_point() else end[name]
        torch.testing.assert_close(value, expected, msg=name)
    assert any("running_var" in name and not torch.allclose(value, start[name]) for name, value in average.items())


def test_statistics_that_came_without_their_count_are_kept_as_others_are() -> None:
    """Files of other projects may hold the one and not the other."""
    counted = student()
    uncounted = copy.deepcopy(counted)
    for name, count in uncounted.named_buffers():
        if name.endswith("num_batches_tracked"):
            count.zero_()
    for network in (counted, uncounted):
        Teacher(network, TeacherSettings(norm="eman", momentum=0.9)).start(network, random_images(8, 5))
    for (name, mine), (_, theirs) in zip(counted.named_buffers(), uncounted.named_buffers(), strict=True):
        assert torch.equal(mine, theirs) or name.endswith("num_batches_tracked"), name


@pytest.mark.parametrize("norm", ["bn", "eman"])
def test_a_pretrained_backbone_keeps_its_statistics_and_a_new_head_takes_the_first_batchs(norm: str) -> None:
    backbone, images = student()[0], random_images(8, 5)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    network = nn.Sequential(backbone, mlp(backbone.num_features, 32, 8, norm=True))
    teacher = Teacher(network, TeacherSettings(norm=norm, momentum=0.9))
    teacher.start(network, images)
    for started in (network, teacher.network):
        assert all(torch.equal(value, before[name]) for name, value in started[0].named_buffers())
    (head,) = (layer for layer in network[1] if isinstance(layer, nn.BatchNorm1d))
    met = network[1][0](copy.deepcopy(backbone)(images)).detach()
    torch.testing.assert_close(head.running_mean, met.mean(dim=0))
    assert torch.equal(teacher.network[1].state_dict()["1.running_mean"], head.running_mean)


def test_a_network_whose_norms_have_all_seen_images_is_not_asked_again() -> None:
    network = student()
    teacher = Teacher(network, TeacherSettings(norm="eman", momentum=0.9))
    network.forward = lambda images: pytest.fail("a pass for nothing")  # type: ignore[method-assign, assignment]
    before = {name: value.clone() for name, value in network.named_buffers()}
    teacher.start(network, random_images(8, 5))
    for name, value in teacher.network.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["bn", "shuffle_bn"])
def test_what_a_teacher_is_shown_does_not_move_its_averaged_statistics(norm: str) -> None:
    teacher = Teacher(student(), TeacherSettings(norm=norm, momentum=0.9, groups=2))
    before = {name: value.clone() for name, value in teacher.network.named_buffers()}
    images = random_images(16, 5)
    said = teacher(Images(images, torch.arange(16).flip(0)), 0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.named_buffers())
    assert not torch.allclose(said, teacher.network.eval()(images), atol=1e-3)  # though it normalises by their own


def test_an_eman_teachers_word_on_an_image_does_not_depend_on_its_neighbours() -> None:
    teacher = Teacher(student(), TeacherSettings(norm="eman", momentum=0.9))
    teacher.train()  # as the loop does: the copy must stay in evaluation mode
    image = random_images(1)
    beside = [teacher(Images(torch.cat([image, scale * random_images(7, seed)])), 0)[0] for scale, seed in ((1, 1), (9, 2))]
    torch.testing.assert_close(beside[0], beside[1], rtol=1e-5, atol=1e-6)


def test_a_bn_teachers_word_depends_on_them() -> None:
    teacher = Teacher(student(), TeacherSettings(norm="bn", momentum=0.9))
    image = random_images(1)
    beside = [teacher(Images(torch.cat([image, scale * random_images(7, seed)])), 0)[0] for scale, seed in ((1, 1), (9, 2))]
    assert not torch.allclose(beside[0], beside[1], atol=1e-3)


def test_shuffled_keys_are_normalised_in_groups_of_the_permuted_batch() -> None:
    network, images, order = student(), random_images(12), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    teacher = Teacher(network, TeacherSettings(norm="shuffle_bn", momentum=0.9, groups=3))
    keys = teacher(Images(images, order), 0)
    for group in range(3):
        members = order[4 * group : 4 * group + 4]
        expected = copy.deepcopy(network)(images[members])  # statistics of these four images alone
        torch.testing.assert_close(keys[members], expected)


def test_the_images_behind_a_querys_statistics_are_not_those_behind_its_keys() -> None:
    """Moving one image moves the queries of its group in batch order, and the keys of its group in the permuted order."""
    network, images = student(), random_images(12)
    order = torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    teacher = Teacher(network, TeacherSettings(norm="shuffle_bn", momentum=0.9, groups=3))
    other = images.clone()
    other[1] += 5

    def reached(before: Tensor, after: Tensor) -> set[int]:
        return set(torch.nonzero((before - after).abs().amax(dim=1) > 1e-4).flatten().tolist())

    queries = reached(*(in_groups(copy.deepcopy(network), x, 3).detach() for x in (images, other)))
    keys = reached(*(copy.deepcopy(teacher)(Images(x, order), 0) for x in (images, other)))
    assert queries == {0, 1, 2, 3}
    assert keys == {0, 4, 8, 1}


@pytest.mark.parametrize("norm", ["bn", "eman"])
def test_student_and_teacher_are_different_tensors(norm: str) -> None:
    network = student()
    teacher = Teacher(network, TeacherSettings(norm=norm, momentum=0.9))
    mine, theirs = list(teacher.network.parameters()), list(network.parameters())
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(mine, theirs, strict=True))


def test_untouched_statistics_uses_the_batchs_and_leaves_the_running_ones() -> None:
    network, images = student(), random_images(8, 5)
    before = {name: value.clone() for name, value in network.named_buffers()}
    with untouched_statistics(network):
        quiet = network(images)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    torch.testing.assert_close(quiet, network(images))
    assert any(not torch.equal(value, before[name]) for name, value in network.named_buffers())
