"""What the methods of stage two share: a classifier, its moving average, targets without gradient, one pass with gradient."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modicum import distributed
from modicum.data.stream import Batch, Sample
from modicum.errors import InputError
from modicum.finetune.alignment import DistributionAlignment, check_prior
from modicum.method import Decisions, Facts, Method, Progress, Recipe, decide_momentum
from modicum.networks import Backbone, Classifier
from modicum.settings import AUTO, TeacherSettings
from modicum.teacher import Teacher, untouched_statistics

KINDS = ("student", "ema", "eman")  # weights that a run can be judged by: the last, their average, that with averaged norm statistics
TeacherOrNone = TeacherSettings | Literal["none"]


@dataclass(frozen=True)
class Guesses:
    """What a method made of one step's unlabelled images; the audit compares it with the truth, which no method ever sees."""

    rows: Tensor  # int64 (N,): rows of the data set
    probabilities: Tensor  # (N, C)
    used: Tensor  # (N,), 0 or 1, or a weight between


class SemiSupervised(Method):
    """Base of the methods of stage two. The average is what is evaluated; it is also the teacher, where a method has one."""

    one_size: ClassVar = True
    teacher_norms: ClassVar = ("bn", "sync_bn", "eman")
    recipe: ClassVar = Recipe("sgd", lr=0.03, weight_decay=5e-4, batch=64, nesterov=True, schedule="cosine_7_16")
    student: Classifier
    align: DistributionAlignment  # of methods that align the guesses that are learnt
    guesses: Guesses | None = None
    ledger: nn.Module  # the audit's, here for the state alone

    def __init__(self, backbone: Backbone, facts: Facts, teacher: TeacherOrNone = "none") -> None:
        super().__init__()
        self.student = Classifier(backbone, facts.num_classes)
        self.has_teacher = teacher != "none"
        average = TeacherSettings(norm="bn", momentum=facts.ema_momentum) if teacher == "none" else teacher
        self.average = Teacher(self.student, average)

    def prepare(self, batch: Batch) -> None:
        self.average.start(self.student, batch["unlabelled" if "unlabelled" in batch else "labelled"].view(0))

    def start_head(self, weight: Tensor, bias: Tensor) -> None:
        """Sets the head (C, D), (C,) of every classifier, the student's average included, before the first step."""
        for network in self.modules():
            if isinstance(network, Classifier):
                network.set_head(weight, bias)

    def features(self, *images: Tensor) -> list[Tensor]:
        """The student's features of several sets of images in ONE pass, so that all are normalised by the same mixture."""
        return in_one_pass(self.student.backbone, *images)

    def together(self, *images: Tensor) -> list[Tensor]:
        """The student's logits of several sets of images in ONE pass."""
        return [logits.float() for logits in in_one_pass(self.student, *images)]

    @torch.no_grad()
    def targets(self, sample: Sample, view: int) -> Tensor:
        """Class probabilities (N, C) of one view, without gradient: the teacher's, or the student's own from a pass of its own."""
        if self.has_teacher:
            return self.average(sample, view).float().softmax(dim=1)
        return aside(self.student, sample.view(view)).float().softmax(dim=1)

    def features_without_gradient(self, images: Tensor) -> Tensor:
        """The student's features from a pass of its own, which leaves the running statistics alone."""
        return aside(self.student.backbone, images)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        teacher = settings.get("teacher", "none")
        if teacher != "none" and teacher["norm"] == "shuffle_bn":
            raise InputError(
                "finetune.method.teacher.norm = shuffle_bn has no use in stage two, which compares no query with its key; "
                "choose bn, sync_bn or eman."
            )
        check_prior(settings, facts)
        decisions = super().decide(settings, facts)
        if settings.get("momentum") == AUTO:  # of what a method keeps count of: confidence, classes
            decisions["momentum"] = decide_momentum(0.999, facts.steps, share=0.1)
        return decisions

    def after_step(self, progress: Progress) -> None:
        self.average.update(self.student)

    @property
    def class_prior(self) -> tuple[float, ...] | None:
        """The shares (C,) that the method aligns what it learns to, for labels that are propagated before and after it."""
        return self.align.known_prior if hasattr(self, "align") else None

    @property
    def average_kind(self) -> str:
        """What its average is, of KINDS."""
        return "eman" if self.average.norm == "eman" else "ema"

    @torch.no_grad()
    def classifier(self, kind: str) -> Classifier:
        """One of KINDS: the student itself, or a copy of its average, with the student's norm statistics or with averaged ones."""
        if kind == "student":
            return self.student
        network: Any = copy.deepcopy(self.average.network)
        if kind == "ema":
            for mine, theirs in zip(network.buffers(), self.student.buffers(), strict=True):
                mine.copy_(theirs)
        return network


def in_one_pass(network: nn.Module, *images: Tensor) -> list[Tensor]:
    """What `network` says of several sets of images, all normalised by the same mixture."""
    return list(network(torch.cat(images)).split([len(part) for part in images]))


@torch.no_grad()
def aside(network: nn.Module, images: Tensor) -> Tensor:
    """What `network` says of images in a pass of their own, without gradient, which leaves its running statistics alone."""
    with untouched_statistics(network):
        return network(images)


@torch.no_grad()
def remember(memory: Tensor, sample: Sample, values: Tensor) -> None:
    """Writes `values` (B, ...) into the rows of `memory` that belong to the images of all ranks."""
    memory.index_copy_(0, distributed.gather(sample.positions), distributed.gather(values.detach().to(memory.dtype)))
