"""CoMatch (Li 2021, arXiv:2011.11183)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le

from modicum import distributed
from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.finetune.alignment import DistributionAlignment, Prior
from modicum.finetune.losses import embedding_cross_entropy, pseudo_label_graph, similarities, soft_label
from modicum.finetune.memory import Memory
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Decisions, Facts, Loss
from modicum.networks import Backbone, mlp
from modicum.settings import AUTO


class CoMatch(SemiSupervised):
    """Guesses are smoothed by neighbours in an embedding, and two strong views' embeddings learn which guesses are alike."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong", "strong")}
    target_views: ClassVar = {"unlabelled": (0,)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a smoothed guess counts"] = 0.95,
        temperature: Annotated[float, Gt(0), "of similarities"] = 0.2,
        smoothing: Annotated[float, Ge(0), Le(1), "share of its own in a guess, the rest from neighbours"] = 0.9,
        graph_threshold: Annotated[float, Ge(0), Le(1), "agreement of guesses from which images are joined"] = 0.8,
        memory_size: Annotated[int, Ge(1), "images that guesses are smoothed by"] = AUTO,
        distribution_alignment: Annotated[
            Prior, "how often guesses are made to name each class: none, uniform, labelled, estimated, or shares"
        ] = "uniform",
        embedding_size: Annotated[int, Ge(1), "of the projector"] = 64,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        lambda_c: Annotated[float, Ge(0), "weight of the embeddings' loss"] = 1.0,
    ) -> None:
        super().__init__(backbone, facts)
        self.threshold, self.temperature, self.smoothing, self.graph_threshold = threshold, temperature, smoothing, graph_threshold
        self.lambda_u, self.lambda_c = lambda_u, lambda_c
        self.align = DistributionAlignment(distribution_alignment, facts)
        self.projector = mlp(backbone.num_features, backbone.num_features, embedding_size)
        self.memory = Memory(memory_size, embedding_size, facts.num_classes)

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        known, first, second = self.features(labelled.view(0), unlabelled.view(1), unlabelled.view(2))
        logits, strong = self.student.head(known).float(), self.student.head(first).float()
        embedded = [F.normalize(self.projector(features).float()) for features in (known, first, second)]
        with torch.no_grad():
            weak = self.features_without_gradient(unlabelled.view(0))
            own = self.align(self.student.head(weak).float().softmax(dim=1))
            embedding = F.normalize(self.projector(weak).float())
            guesses = self.memory.smooth(embedding, own, self.temperature, self.smoothing)
            truth = F.one_hot(labelled.labels, own.shape[1]).to(own.dtype)
            self.memory.enqueue(embedding, own)
            self.memory.enqueue(embedded[0], truth)
            used = (guesses.amax(dim=1) >= self.threshold).float()
            graph = pseudo_label_graph(distributed.gather(guesses), self.graph_threshold)
        self.guesses = Guesses(unlabelled.rows, guesses, used)
        likeness = similarities(distributed.gather(embedded[1]), distributed.gather(embedded[2]))
        parts = {
            "labelled": F.cross_entropy(logits, labelled.labels),
            "unlabelled": soft_label(strong, guesses, used),
            "embedding": embedding_cross_entropy(likeness, graph, self.temperature),
        }
        return Loss(parts["labelled"] + self.lambda_u * parts["unlabelled"] + self.lambda_c * parts["embedding"], parts)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions = super().decide(settings, facts)
        if settings["memory_size"] == AUTO:
            decisions["memory_size"] = min(2560, facts.num_images), "the paper's 2560, or as many as there are training images"
        elif settings["memory_size"] > facts.num_images:
            raise InputError(
                f"finetune.method.memory_size = {settings['memory_size']} is larger than the {facts.num_images} training images; "
                "choose fewer."
            )
        return decisions
