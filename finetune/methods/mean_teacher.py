"""Mean Teacher (Tarvainen 2017, arXiv:1703.01780)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

from modicum.data.stream import Batch
from modicum.finetune.losses import consistency, ramp_up
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone
from modicum.settings import TeacherSettings


class MeanTeacher(SemiSupervised):
    """The student's prediction on one view must equal the averaged teacher's on another, for labelled and unlabelled images."""

    views: ClassVar = {"labelled": ("weak", "weak"), "unlabelled": ("weak", "weak")}
    target_views: ClassVar = {"labelled": (0,), "unlabelled": (0,)}  # of weak/strong the weak ones

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        consistency: Annotated[Literal["mse", "kl"], "distance of the two predictions"] = "mse",
        lambda_u: Annotated[float, Ge(0), "weight of the consistency at the end of the ramp"] = 100.0,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which the weight rises"] = 0.4,
        teacher: Annotated[TeacherSettings, "the averaged network whose predictions are the targets"] = TeacherSettings(norm="bn"),
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.kind, self.lambda_u, self.ramp_length = consistency, lambda_u, ramp_up

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, unlabelled_logits = self.together(labelled.view(1), unlabelled.view(1))
        student = torch.cat([logits, unlabelled_logits])
        teacher = torch.cat([self.targets(sample, view=0) for sample in (labelled, unlabelled)])  # no gradient
        weight = self.lambda_u * ramp_up(self.progress.fraction, self.ramp_length)
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "consistency": consistency(student, teacher, self.kind)}
        return Loss(parts["labelled"] + weight * parts["consistency"], parts)
