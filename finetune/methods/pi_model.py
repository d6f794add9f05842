"""The Pi-model (Laine 2017, arXiv:1610.02242)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le

from modicum.data.stream import Batch
from modicum.finetune.losses import consistency, ramp_up
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class PiModel(SemiSupervised):
    """Two views of an image, labelled or not, must be predicted alike by the same network."""

    views: ClassVar = {"labelled": ("weak", "weak"), "unlabelled": ("weak", "weak")}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        consistency: Annotated[
            Literal["mse", "kl"], "distance of the two predictions; kl holds the first one, of the weak view, fixed"
        ] = "mse",
        lambda_u: Annotated[float, Ge(0), "weight of the consistency at the end of the ramp"] = 100.0,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which the weight rises"] = 0.4,
    ) -> None:
        super().__init__(backbone, facts)
        self.kind, self.lambda_u, self.ramp_length = consistency, lambda_u, ramp_up

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, again, others, others_again = self.together(labelled.view(0), labelled.view(1), unlabelled.view(0), unlabelled.view(1))
        targets = torch.cat([logits, others]).softmax(dim=1)
        distance = consistency(torch.cat([again, others_again]), targets, self.kind)
        weight = self.lambda_u * ramp_up(self.progress.fraction, self.ramp_length)
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "consistency": distance}
        return Loss(parts["labelled"] + weight * parts["consistency"], parts)
