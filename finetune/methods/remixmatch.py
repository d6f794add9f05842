"""ReMixMatch (Berthelot 2020, arXiv:1911.09785)."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.finetune.alignment import DistributionAlignment, Prior
from modicum.finetune.losses import linear_ramp, sharpen, soft_label
from modicum.finetune.mixup import Mixing
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, TeacherOrNone
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class ReMixMatch(SemiSupervised):
    """The aligned, sharpened guess on a weak view is the label of strong ones, mixed with labelled images; turns are told, too."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong", "strong")}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "below 1 sharpens the guesses"] = 0.5,
        alpha: Annotated[float, Gt(0), "of the Beta distribution that shares are drawn from"] = 0.75,
        distribution_alignment: Annotated[
            Prior, "how often guesses are made to name each class: none, uniform, labelled, estimated, or shares"
        ] = "labelled",
        lambda_u: Annotated[float, Ge(0), "weight of the mixed unlabelled loss at the end of the ramp"] = 1.5,
        lambda_s: Annotated[float, Ge(0), "weight of the strong views that are not mixed, at the end of the ramp"] = 0.5,
        lambda_r: Annotated[float, Ge(0), "weight of telling by how many quarters an image is turned"] = 0.5,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which the weights rise"] = 0.0156,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.temperature, self.alpha, self.seed, self.ramp_length = temperature, alpha, seed, ramp_up
        self.lambda_u, self.lambda_s, self.lambda_r = lambda_u, lambda_s, lambda_r
        self.align = DistributionAlignment(distribution_alignment, facts)
        self.quarters = nn.Linear(backbone.num_features, 4)

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        truth = F.one_hot(labelled.labels, self.student.head.out_features).float()
        aligned = self.align(self.targets(unlabelled, view=0))
        guesses = sharpen(aligned, self.temperature)  # (mu B, C)
        one = torch.ones_like(guesses[:, 0])
        self.guesses = Guesses(unlabelled.rows, aligned, one)
        images = torch.cat([labelled.view(0), *(unlabelled.view(number) for number in range(3))])
        targets = torch.cat([truth, guesses, guesses, guesses])
        mix = Mixing(len(images), self.alpha, images.device, self.seed, "remixmatch", self.progress.step, distributed.rank(), keep=True)
        mixed, targets = mix(images), mix(targets)
        strong = unlabelled.view(1)
        turns = torch.arange(len(strong), device=strong.device) % 4
        turned = torch.cat([strong[number::4].rot90(number, (2, 3)) for number in range(4)])
        told = torch.cat([turns[number::4] for number in range(4)])
        features, plain, rotated = self.features(mixed, strong, turned)
        logits = self.student.head(features).float()
        known = len(truth)
        ramp = linear_ramp(self.progress.fraction, 0, self.ramp_length)
        parts = {
            "labelled": F.cross_entropy(logits[:known], targets[:known]),
            "unlabelled": F.cross_entropy(logits[known:], targets[known:]),
            "strong": soft_label(self.student.head(plain).float(), guesses, one),
            "rotation": F.cross_entropy(self.quarters(rotated).float(), told),
        }
        rising = self.lambda_u * parts["unlabelled"] + self.lambda_s * parts["strong"]
        return Loss(parts["labelled"] + ramp * rising + self.lambda_r * parts["rotation"], parts)
