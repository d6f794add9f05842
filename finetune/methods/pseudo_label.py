"""Pseudo-Label (Lee 2013, ICML workshop on challenges in representation learning)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.finetune.losses import linear_ramp, pseudo_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Decisions, Facts, Loss
from modicum.networks import Backbone


class PseudoLabel(SemiSupervised):
    """The class that the network finds likeliest is the label of an unlabelled image, with a weight that rises."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss at the end of the ramp"] = 3.0,
        ramp_start: Annotated[float, Ge(0), Le(1), "share of the run after which the weight begins to rise"] = 0.1,
        ramp_end: Annotated[float, Ge(0), Le(1), "share of the run at which it has risen"] = 0.6,
    ) -> None:
        super().__init__(backbone, facts)
        self.lambda_u, self.ramp = lambda_u, (ramp_start, ramp_end)

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, others = self.together(labelled.view(0), unlabelled.view(0))
        targets = others.detach().softmax(dim=1)  # (mu B, C)
        used = torch.ones_like(targets[:, 0])  # however unsure
        self.guesses = Guesses(unlabelled.rows, targets, used)
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "unlabelled": pseudo_label(others, targets.argmax(dim=1), used)}
        return Loss(parts["labelled"] + self.lambda_u * linear_ramp(self.progress.fraction, *self.ramp) * parts["unlabelled"], parts)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        start, end = settings["ramp_start"], settings["ramp_end"]
        if start > end:
            raise InputError(
                f"finetune.method.ramp_start = {start:g} lies behind ramp_end = {end:g}, and the weight rises from the one to the other: "
                f"choose a ramp_end from {start:g} to 1, or an earlier start."
            )
        return super().decide(settings, facts)
