"""FixMatch's frame, which its successors share: the guess on a weak view teaches the strong view of the same image."""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from modicum.data.stream import Batch, Sample
from modicum.finetune.losses import pseudo_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Loss


class WeakToStrong(SemiSupervised):
    """A subclass says by `judge` which guesses count; the rest may be overridden where its paper differs."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong")}
    target_views: ClassVar = {"unlabelled": (0,)}
    lambda_u: float

    def predict(self, labelled: Sample, unlabelled: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of labelled images and of strong views, from one pass, and class probabilities of weak views without gradient."""
        logits, strong = self.together(labelled.view(0), unlabelled.view(1))
        return logits, strong, self.targets(unlabelled, view=0)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of probabilities (N, C) on weak views: those to learn (N, C), and 1 or 0, or a weight, for each (N,).

        `logits` are those of the labelled images, for methods that compare.
        """
        raise NotImplementedError

    def supervise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def teach(self, strong: Tensor, guesses: Guesses) -> dict[str, Tensor]:
        """The parts of the loss that strong views' logits (N, C) have."""
        return {"unlabelled": pseudo_label(strong, guesses.probabilities.argmax(dim=1), guesses.used)}

    def weights(self) -> Mapping[str, float]:
        """Of the parts of `teach`."""
        return {"unlabelled": self.lambda_u}

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, strong, targets = self.predict(labelled, unlabelled)
        self.guesses = Guesses(unlabelled.rows, *self.judge(targets, unlabelled, logits.detach()))
        parts = {"labelled": self.supervise(logits, labelled.labels), **self.teach(strong, self.guesses)}
        return Loss(sum((weight * parts[name] for name, weight in self.weights().items()), start=parts["labelled"]), parts)
