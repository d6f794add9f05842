"""MixMatch (Berthelot 2019, arXiv:1905.02249)."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le

from modicum import distributed
from modicum.data.stream import Batch
from modicum.finetune.losses import linear_ramp, sharpen, soft_label, squared_error
from modicum.finetune.mixup import Mixing
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, TeacherOrNone
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class MixMatch(SemiSupervised):
    """The sharpened mean of two views' predictions is the label of both; then all images, labelled or not, are mixed."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "weak")}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "below 1 sharpens the guesses"] = 0.5,
        alpha: Annotated[float, Gt(0), "of the Beta distribution that shares are drawn from"] = 0.75,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss at the end of the ramp"] = 75.0,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which the weight rises"] = 0.4,
        teacher: Annotated[TeacherOrNone, "who predicts the guesses; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.temperature, self.alpha, self.lambda_u, self.ramp_length, self.seed = temperature, alpha, lambda_u, ramp_up, seed

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        mean = (self.targets(unlabelled, view=0) + self.targets(unlabelled, view=1)) / 2
        guesses = sharpen(mean, self.temperature)  # (mu B, C)
        self.guesses = Guesses(unlabelled.rows, mean, torch.ones_like(mean[:, 0]))
        images = torch.cat([labelled.view(0), unlabelled.view(0), unlabelled.view(1)])
        targets = torch.cat([F.one_hot(labelled.labels, guesses.shape[1]).to(guesses.dtype), guesses, guesses])
        mix = Mixing(len(images), self.alpha, images.device, self.seed, "mixmatch", self.progress.step, distributed.rank(), keep=True)
        images, targets = mix(images), mix(targets)
        logits, others = self.together(images[: len(labelled.labels)], images[len(labelled.labels) :])
        known, guessed = targets[: len(logits)], targets[len(logits) :]
        weight = self.lambda_u * linear_ramp(self.progress.fraction, 0, self.ramp_length)
        parts = {
            "labelled": soft_label(logits, known, torch.ones_like(known[:, 0])),
            "unlabelled": squared_error(others, guessed, torch.ones_like(guessed[:, 0])),
        }
        return Loss(parts["labelled"] + weight * parts["unlabelled"], parts)
