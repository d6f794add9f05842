"""The moving average of a student, used by both stages. EMAN is one of its norms (Cai 2021, arXiv:2101.08482)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from modicum import distributed
from modicum.data.stream import Sample
from modicum.hardware import send
from modicum.networks.folding import Folded
from modicum.networks.norms import GroupedBatchNorm, replace_norms
from modicum.settings import TeacherSettings


class Teacher(nn.Module):
    """A frozen copy of `student` whose parameters and norm statistics follow it: t <- m t + (1 - m) s.

    norm `bn`: normalises with the statistics of its own batch, and leaves the averaged ones to whoever evaluates it.
    norm `shuffle_bn`: the same, of a permuted batch that is split into groups, so that a key never shares its statistics with
        its query (He 2019, arXiv:1911.05722, section 3.3).
        The groups are those of the batch of all ranks, so that their number does not change the outcome.
    norm `sync_bn`: as `bn`, over the batch of all ranks (`networks/norms.py`).
    norm `eman`: normalises with the averaged statistics, as in evaluation: what it says of an image does not depend on what stands
        beside it. Its constant norm is folded into its convolutions.
    """

    folded: Folded | None = None

    def __init__(self, student: nn.Module, settings: TeacherSettings) -> None:
        super().__init__()
        if settings.norm == "shuffle_bn":
            replace_norms(student, GroupedBatchNorm)
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.norm = settings.norm
        self.momentum = float(settings.momentum)
        self.groups = int(settings.groups) // distributed.world_size() if settings.norm == "shuffle_bn" else 1  # of this rank
        self.train()

    def train(self, mode: bool = True) -> "Teacher":
        super().train(mode)
        self.network.train(mode and self.norm != "eman")
        return self

    @torch.no_grad()  # not inference_mode: keys enter the student's graph
    def forward(self, sample: Sample, view: int) -> Tensor:
        """The network's output for one view of this rank's images, in their order: (B, D)."""
        if self.norm == "eman":
            return self._in_evaluation(sample.view(view))
        with untouched_statistics(self.network):
            if self.norm != "shuffle_bn":
                return self.network(sample.view(view))
            order = sample.permutation()
            shuffled = distributed.gather(in_groups(self.network, sample.view(view, order), self.groups))
        return shuffled[send(torch.argsort(order)[distributed.share(len(order))], shuffled.device)]

    def _in_evaluation(self, images: Tensor) -> Tensor:
        kind = images.device.type
        if kind == "meta":  # where it cannot be seen whether folding changes anything
            return self.network(images)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if self.folded is None or self.folded.dtype != dtype:
            self.folded = Folded(self.network, images, dtype)
        return self.folded(images)

    @torch.no_grad()
    def start(self, student: nn.Module, images: Tensor) -> None:
        """Once, before the first step: gives student and teacher the norm statistics of `images` (B, C, S, S), where they have none yet.

        Statistics of mean 0 and variance 1 do not belong to random weights. An EMAN teacher that starts with them maps all
        images to nearly one point (mean cosine of keys 0.99 on digits, against 0.8 with a batch's own), and contrast with such
        keys collapses before the average has caught up. A pretrained backbone's statistics are better than those of one batch, and stay as
        they are.
        """
        norms = _tracking(student)
        new = [norm for norm in norms if _as_made(norm)]
        usual = [norm.momentum for norm in new]
        for norm in new:
            norm.momentum = 1.0
        if new:
            with untouched_statistics(nn.ModuleList(norm for norm in norms if norm not in new)):
                student(images)
        for norm, momentum in zip(new, usual, strict=True):
            norm.momentum = momentum
        for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | None = None) -> None:
        """Moves one step towards `student`; `momentum` overrides the constant one, for schedules."""
        weight = 1 - (self.momentum if momentum is None else momentum)
        torch._foreach_lerp_(list(self.network.parameters()), list(student.parameters()), weight)
        for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, weight)
            else:
                mine.copy_(theirs)


def in_groups(network: nn.Module, images: Tensor, groups: int) -> Tensor:
    """`network` applied to a batch of which each of `groups` equal parts has norm statistics of its own, in the order of the batch.

    Its norms must be grouped ones, as those of a student and its `shuffle_bn` teacher are.
    """
    norms = [module for module in network.modules() if isinstance(module, GroupedBatchNorm)]
    for norm in norms:
        norm.groups = groups
    try:
        return network(images)
    finally:
        for norm in norms:
            norm.groups = 1


def _tracking(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats]


def _as_made(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the norm has seen no image. Weights of other projects may come with statistics and without their count."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not norm.num_batches_tracked and not norm.running_mean.any() and bool((norm.running_var == 1).all())


@contextmanager
def untouched_statistics(network: nn.Module) -> Iterator[None]:
    """Within, batch norm uses the batch's statistics as in training, but leaves its running ones alone."""
    norms = _tracking(network)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
