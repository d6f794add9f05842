"""ShrinkMatch (Yang 2023, arXiv:2308.06777)."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from modicum.data.stream import Sample
from modicum.finetune.alignment import DistributionAlignment, Prior, RunningMean
from modicum.finetune.losses import shrunk_label
from modicum.finetune.semi_supervised import Guesses, TeacherOrNone
from modicum.finetune.thresholds import shrunk_classes
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone, mlp
from modicum.settings import AUTO


class ShrinkMatch(WeakToStrong):
    """FixMatch in which an unsure guess counts, too: among the classes that are left when those it is confused with are out."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a prediction counts, among all classes or those left"] = 0.95,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        lambda_s: Annotated[float, Ge(0), "weight of the loss among the classes left, times the share of sure guesses"] = 1.0,
        momentum: Annotated[float, Ge(0), Lt(1), "of the running share of sure guesses"] = AUTO,
        distribution_alignment: Annotated[
            Prior, "how often guesses are made to name each class: none, uniform, labelled, estimated, or shares"
        ] = "uniform",
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.lambda_u, self.lambda_s = threshold, lambda_u, lambda_s
        self.align = DistributionAlignment(distribution_alignment, facts)
        self.sure = RunningMean(torch.tensor(0.0), momentum)
        # A head of its own, since the first one must not learn to tell a class from some of the others alone.
        self.auxiliary = mlp(backbone.num_features, max(1, backbone.num_features // 4), facts.num_classes, num_layers=3, norm=True)

    def predict(self, labelled: Sample, unlabelled: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """Strong views have the logits of both heads, side by side (mu B, 2 C)."""
        known, others = self.features(labelled.view(0), unlabelled.view(1))
        strong = torch.cat([self.student.head(others), self.auxiliary(others)], dim=1).float()
        return self.student.head(known).float(), strong, self.targets(unlabelled, view=0)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        targets = self.align(targets)
        used = (targets.amax(dim=1) >= self.threshold).float()
        self.sure(used)
        return targets, used

    def teach(self, strong: Tensor, guesses: Guesses) -> dict[str, Tensor]:
        logits, auxiliary = strong.chunk(2, dim=1)
        confidence, guess = guesses.probabilities.max(dim=1)
        kept = shrunk_classes(guesses.probabilities, self.threshold)
        weights = self.sure.mean * confidence * (1 - guesses.used) * (kept.sum(dim=1) > 1)
        return super().teach(logits, guesses) | {"shrunk": shrunk_label(auxiliary, guess, kept, weights)}

    def weights(self) -> dict[str, float]:
        return {"unlabelled": self.lambda_u, "shrunk": self.lambda_s}
