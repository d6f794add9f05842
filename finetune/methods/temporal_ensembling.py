"""Temporal ensembling (Laine 2017, arXiv:1610.02242)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from torch import Tensor

from modicum.data.stream import Batch
from modicum.finetune.losses import consistency, ramp_up
from modicum.finetune.semi_supervised import SemiSupervised, remember
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class TemporalEnsembling(SemiSupervised):
    """The prediction on an image must equal the mean of what was predicted each time it was seen before."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}
    ensemble: Tensor  # (unlabelled images, C): Z of the paper
    seen: Tensor  # (unlabelled images,): how often, the paper's epoch

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        consistency: Annotated[Literal["mse", "kl"], "distance of prediction and ensemble"] = "mse",
        memory: Annotated[float, Ge(0), Lt(1), "share of the ensemble that is kept when an image is seen again"] = 0.6,
        lambda_u: Annotated[float, Ge(0), "weight of the consistency at the end of the ramp"] = 30.0,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which the weight rises"] = 0.4,
    ) -> None:
        super().__init__(backbone, facts)
        self.kind, self.memory, self.lambda_u, self.ramp_length = consistency, memory, lambda_u, ramp_up
        self.register_buffer("ensemble", torch.zeros(facts.num_unlabelled, facts.num_classes))
        self.register_buffer("seen", torch.zeros(facts.num_unlabelled))

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, others = self.together(labelled.view(0), unlabelled.view(0))
        past, seen = self.ensemble[unlabelled.positions], self.seen[unlabelled.positions]
        now = others.detach().softmax(dim=1)
        # An image not seen before has no past: it is compared with itself, which costs nothing and teaches nothing.
        targets = torch.where(seen[:, None] > 0, past / (1 - self.memory**seen).clamp_min(1e-6)[:, None], now)
        remember(self.ensemble, unlabelled, torch.lerp(now, past, self.memory))
        remember(self.seen, unlabelled, seen + 1)
        weight = self.lambda_u * ramp_up(self.progress.fraction, self.ramp_length)
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "consistency": consistency(others, targets, self.kind)}
        return Loss(parts["labelled"] + weight * parts["consistency"], parts)
