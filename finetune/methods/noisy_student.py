"""Noisy Student (Xie 2020, arXiv:1911.04252)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from modicum.data.stream import Batch
from modicum.finetune.losses import pseudo_label, soft_label
from modicum.finetune.selection import selection
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone
from modicum.record import warn


class NoisyStudent(SemiSupervised):
    """A student under noise learns what a teacher without noise says of plain images; then it teaches the next round's student.

    This is one round. Its teacher speaks once, before the first step; what it said is part of the state.
    """

    views: ClassVar = {"labelled": ("strong",), "unlabelled": ("strong",)}
    told: Tensor  # (unlabelled images, C): the teacher's class probabilities
    weight: Tensor  # (unlabelled images,): how often each counts

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        teacher_from: Annotated[str | None, "folder of the first teacher's classifier; none: one fine-tuned on the labels"] = None,
        rounds: Annotated[int, Ge(1), "students trained one after the other, each for all of finetune.steps"] = 3,
        threshold: Annotated[float, Ge(0), Le(1), "confidence from which the teacher's word on an image counts"] = 0.3,
        balance: Annotated[bool, "classes count equally: the surest images of frequent ones, those of rare ones several times"] = True,
        pseudo_labels: Annotated[Literal["soft", "hard"], "the teacher's probabilities, or its likeliest class"] = "soft",
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        dropout: Annotated[float, Ge(0), Lt(1), "share of the head's inputs left out in training"] = 0.5,
        drop_path: Annotated[float, Ge(0), Lt(1), "how often the last residual block is left out in training, earlier ones less"] = 0.2,
    ) -> None:
        if drop_path and not backbone.drop_paths(drop_path):
            warn(f"{backbone.architecture.name} has no stochastic depth: finetune.method.drop_path = {drop_path} does nothing.")
        super().__init__(backbone, facts)
        self.threshold, self.balance, self.kind, self.lambda_u = threshold, balance, pseudo_labels, lambda_u
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("told", torch.full((facts.num_unlabelled, facts.num_classes), 1 / facts.num_classes))
        self.register_buffer("weight", torch.ones(facts.num_unlabelled))

    @torch.no_grad()
    def listen(self, probabilities: Tensor) -> None:
        """Takes in the teacher's class probabilities (unlabelled images, C), in the order of their stream."""
        self.told.copy_(probabilities)
        self.weight.copy_(selection(probabilities, self.threshold, balance=self.balance))

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        features = self.features(labelled.view(0), unlabelled.view(0))
        logits, others = (self.student.head(self.dropout(part)).float() for part in features)
        told, weight = self.told[unlabelled.positions], self.weight[unlabelled.positions]
        self.guesses = Guesses(unlabelled.rows, told, (weight > 0).float())
        taught = soft_label(others, told, weight) if self.kind == "soft" else pseudo_label(others, told.argmax(dim=1), weight)
        parts = {"labelled": F.cross_entropy(logits, labelled.labels), "unlabelled": taught}
        return Loss(parts["labelled"] + self.lambda_u * parts["unlabelled"], parts)
