"""SimMatch (Zheng 2022, arXiv:2203.06915)."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from modicum.data.stream import Batch
from modicum.finetune.alignment import DistributionAlignment, Prior
from modicum.finetune.losses import embedding_cross_entropy, similarities, soft_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, remember
from modicum.method import Facts, Loss
from modicum.networks import Backbone, mlp

FAR = -1e4  # a similarity below all cosines that no temperature makes count, and finite, where all are absent


class SimMatch(SemiSupervised):
    """Strong views must be like the same labelled images as weak ones are; classes and likeness correct each other."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong")}
    target_views: ClassVar = {"unlabelled": (0,)}
    bank: Tensor  # (labelled images, D): their embeddings
    classes: Tensor  # int64 (labelled images,); -1 before the image has come

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a guess counts"] = 0.95,
        temperature: Annotated[float, Gt(0), "of similarities"] = 0.1,
        smoothing: Annotated[float, Ge(0), Le(1), "share of its own in a guess, the rest from the labelled images it is like"] = 0.9,
        bank_momentum: Annotated[float, Ge(0), Lt(1), "share of a labelled image's embedding that is kept"] = 0.7,
        distribution_alignment: Annotated[
            Prior, "how often guesses are made to name each class: none, uniform, labelled, estimated, or shares"
        ] = "uniform",
        embedding_size: Annotated[int, Ge(1), "of the projector"] = 128,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        lambda_i: Annotated[float, Ge(0), "weight of the likeness to labelled images"] = 1.0,
    ) -> None:
        super().__init__(backbone, facts)
        self.threshold, self.temperature, self.smoothing, self.bank_momentum = threshold, temperature, smoothing, bank_momentum
        self.lambda_u, self.lambda_i = lambda_u, lambda_i
        self.align = DistributionAlignment(distribution_alignment, facts)
        self.projector = mlp(backbone.num_features, backbone.num_features, embedding_size)
        self.register_buffer("bank", torch.zeros(facts.num_labelled, embedding_size))
        self.register_buffer("classes", torch.full((facts.num_labelled,), -1))

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        known, others = self.features(labelled.view(0), unlabelled.view(1))
        logits, strong = self.student.head(known).float(), self.student.head(others).float()
        embedding, embedded = (F.normalize(self.projector(features).float()) for features in (known, others))
        with torch.no_grad():
            bank, classes = self.bank.clone(), self.classes.clamp_min(0)
            absent = self.classes < 0  # of these nothing is known yet, so that they have no vote
            begun = ~absent.all()
            weak = self.features_without_gradient(unlabelled.view(0))
            own = self.align(self.student.head(weak).float().softmax(dim=1))
            alike = similarities(F.normalize(self.projector(weak).float()), bank).masked_fill(absent, FAR)  # (mu B, M)
            likeness = (alike / self.temperature).softmax(dim=1)
            voted = torch.where(begun, torch.zeros_like(own).index_add(1, classes, likeness), own)
            guesses = self.smoothing * own + (1 - self.smoothing) * voted
            targets = likeness * own[:, classes]
            targets = targets / targets.sum(dim=1, keepdim=True).clamp_min(1e-12)
            used = (guesses.amax(dim=1) >= self.threshold).float()
            kept = self.bank_momentum * bank[labelled.positions] + (1 - self.bank_momentum) * embedding
            remember(self.bank, labelled, F.normalize(kept))
            remember(self.classes, labelled, labelled.labels)
        self.guesses = Guesses(unlabelled.rows, guesses, used)
        parts = {
            "labelled": F.cross_entropy(logits, labelled.labels),
            "unlabelled": soft_label(strong, guesses, used),
            "likeness": begun * embedding_cross_entropy(similarities(embedded, bank).masked_fill(absent, FAR), targets, self.temperature),
        }
        return Loss(parts["labelled"] + self.lambda_u * parts["unlabelled"] + self.lambda_i * parts["likeness"], parts)
