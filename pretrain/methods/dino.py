"""Self-distillation without labels (Caron 2021, arXiv:2104.14294)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.method import Decisions, Facts, Loss, Method, Progress, Recipe, decide_teacher
from modicum.networks import Backbone
from modicum.networks.stems import SMALL_IMAGE
from modicum.optim import Pace, rising_to_one
from modicum.pretrain.crops import by_size
from modicum.pretrain.losses import across_views
from modicum.pretrain.prototypes import Prototypes
from modicum.settings import AUTO, TeacherSettings
from modicum.teacher import Teacher

PAPER_PROTOTYPES = 65536


def head(widths: list[int], *, norm: bool) -> nn.Sequential:
    """Linear layers of these widths with GELU between them, and `norm` batch norm before each GELU; begins as the authors' does."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in pairwise(widths):
        linear = nn.Linear(num_inputs, num_outputs)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(num_outputs)] if norm else []), nn.GELU()]
    return nn.Sequential(*layers[: -3 if norm else -2], linear)


class DINO(Method):
    """Every view must predict the teacher's distribution over prototypes for the two large crops, which is centred and sharpened."""

    views: ClassVar = {"unlabelled": ("dino_a", "dino_b", *("dino_local",) * 8)}
    fewest_views: ClassVar = 2
    teacher_norms: ClassVar = ("bn", "sync_bn", "eman")
    recipe: ClassVar = Recipe("adamw", lr=5e-4, weight_decay=0.04, warmup=0.1)
    collapse_causes: ClassVar = {
        "pretrain.method.teacher_temperature": "too high",
        "pretrain.method.centre_momentum": "too high",
        "pretrain.method.teacher.momentum": "too low",
    }
    centre: Tensor

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "of the student"] = 0.1,
        teacher_temperature: Annotated[float, Gt(0), "of the teacher, at the end of its rise"] = 0.07,
        teacher_temperature_start: Annotated[float, Gt(0), "of the teacher, at the start"] = 0.04,
        rise: Annotated[float, Gt(0), Le(1), "share of the run in which the teacher's temperature rises"] = 0.3,
        centre_momentum: Annotated[float, Ge(0), Lt(1), "share of the centre kept at each step"] = 0.9,
        num_prototypes: Annotated[int, Ge(2), "outputs of the head"] = AUTO,
        frozen_epochs: Annotated[float, Ge(0), "first epochs in which the prototypes stand still"] = 1.0,
        hidden_size: Annotated[int, Ge(2), "width of the head"] = 2048,
        embedding_size: Annotated[int, Ge(2), "dimensions of embeddings and prototypes"] = 256,
        head_norm: Annotated[bool, "batch norm in the head"] = AUTO,
        teacher: Annotated[TeacherSettings, "its momentum rises to 1 over the run"] = TeacherSettings(norm="bn"),
    ) -> None:
        super().__init__()
        widths = [backbone.num_features, hidden_size, hidden_size, embedding_size]
        self.student = nn.Sequential(backbone, head(widths, norm=head_norm), Prototypes(embedding_size, num_prototypes))
        self.paces = {"student.2": Pace(starts=facts.share_of_run(frozen_epochs))}
        self.teacher = Teacher(self.student, teacher)
        self.register_buffer("centre", torch.zeros(num_prototypes))
        self.temperature, self.rise, self.centre_momentum = temperature, rise, centre_momentum
        self.teacher_temperatures = teacher_temperature_start, teacher_temperature

    def prepare(self, batch: Batch) -> None:
        self.teacher.start(self.student, batch["unlabelled"].view(0))

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        views = [images.view(number) for number in range(images.num_views)]
        students = by_size(self.student, views)  # (N, K) each
        teachers = [self.teacher(images, view=number) for number in (0, 1)]
        first, last = self.teacher_temperatures
        sharpness = first + (last - first) * min(1.0, self.progress.fraction / self.rise)
        targets = [((scores - self.centre) / sharpness).softmax(dim=1) for scores in teachers]
        self.new_centre = torch.cat(teachers).mean(dim=0)
        return Loss(across_views([scores / self.temperature for scores in students], targets))

    def after_step(self, progress: Progress) -> None:
        self.teacher.update(self.student, rising_to_one(self.teacher.momentum, progress.fraction))
        self.centre.lerp_(distributed.gather(self.new_centre[None]).mean(dim=0), 1 - self.centre_momentum)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions = decide_teacher(settings["teacher"], facts, momentum=0.996, share=0.25)
        if settings["num_prototypes"] == AUTO:
            fitting = min(PAPER_PROTOTYPES, 2 ** (max(4, facts.num_images // 16).bit_length() - 1))
            why = f"the paper's {PAPER_PROTOTYPES}, or the largest power of two in a sixteenth of the {facts.num_images} images"
            decisions["num_prototypes"] = fitting, why
        if settings["head_norm"] == AUTO:
            small = not facts.transformer and facts.image_size <= SMALL_IMAGE
            why = "small images through convolutions begin close together, and would stay there without it" if small else "the paper's"
            decisions["head_norm"] = small, why
        return decisions
