"""Entropy minimisation (Grandvalet 2004, NIPS, "Semi-supervised learning by entropy minimization")."""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from annotated_types import Ge

from modicum.data.stream import Batch
from modicum.finetune.losses import entropy
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class EntropyMin(SemiSupervised):
    """The network should be sure of unlabelled images, whatever it takes them for."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        lambda_u: Annotated[float, Ge(0), "weight of the entropy"] = 0.1,
    ) -> None:
        super().__init__(backbone, facts)
        self.lambda_u = lambda_u

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, others = self.together(labelled.view(0), unlabelled.view(0))
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "entropy": entropy(others)}
        return Loss(parts["labelled"] + self.lambda_u * parts["entropy"], parts)
