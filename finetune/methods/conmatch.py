"""ConMatch (Kim 2022, arXiv:2208.08631), with its learnt confidence."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from modicum.data.stream import Batch
from modicum.finetune.losses import attenuated, pseudo_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, TeacherOrNone
from modicum.method import Facts, Loss
from modicum.networks import Backbone, mlp


class ConMatch(SemiSupervised):
    """FixMatch on two strong views, each of which also learns what the other says, as far as a small network believes it."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong", "strong")}
    target_views: ClassVar = {"unlabelled": (0,)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a prediction on a weak view counts as a label"] = 0.95,
        lambda_u: Annotated[float, Ge(0), "weight of what strong views learn from the weak one"] = 1.0,
        lambda_c: Annotated[float, Ge(0), "weight of what strong views learn from each other"] = 1.0,
        penalty: Annotated[float, Gt(0), "price of doubt: the loss to the weak view's guess that full confidence stands"] = 0.5,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.lambda_u, self.lambda_c, self.penalty = threshold, lambda_u, lambda_c, penalty
        self.estimator = ConfidenceEstimator(backbone.num_features, facts.num_classes)

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        features = self.features(labelled.view(0), unlabelled.view(1), unlabelled.view(2))
        logits, first, second = (self.student.head(part).float() for part in features)
        trust, first_trust, second_trust = (
            self.estimator(part.detach(), said.detach()) for part, said in zip(features, (logits, first, second), strict=True)
        )
        targets = self.targets(unlabelled, view=0)
        confidence, guess = targets.max(dim=1)
        used = (confidence >= self.threshold).float()
        self.guesses = Guesses(unlabelled.rows, targets, used)
        right = (logits.argmax(dim=1) == labelled.labels).float()
        doubts = [F.cross_entropy(said.detach(), guess, reduction="none") for said in (first, second)]
        parts = {
            "labelled": F.cross_entropy(logits, labelled.labels),
            "unlabelled": pseudo_label(first, guess, used) + pseudo_label(second, guess, used),
            "consistency": pseudo_label(second, first.argmax(dim=1), first_trust.detach().sigmoid())
            + pseudo_label(first, second.argmax(dim=1), second_trust.detach().sigmoid()),
            "confidence": F.binary_cross_entropy_with_logits(trust, right)
            + attenuated(first_trust, doubts[0], self.penalty)
            + attenuated(second_trust, doubts[1], self.penalty),
        }
        learnt = parts["labelled"] + self.lambda_u * parts["unlabelled"] + self.lambda_c * parts["consistency"]
        return Loss(learnt + parts["confidence"], parts)


class ConfidenceEstimator(nn.Module):
    """Features (N, D) and logits (N, C) -> score (N,) whose sigmoid is the probability that the prediction is right.

    It sees probabilities in falling order: how sure, not of what.
    """

    def __init__(self, num_features: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.features, self.predictions = nn.Linear(num_features, width), nn.Linear(num_classes, width)
        self.score = mlp(2 * width, width, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        ranked = logits.softmax(dim=1).sort(dim=1, descending=True).values
        both = torch.cat([self.features(F.normalize(features)).relu(), self.predictions(ranked).relu()], dim=1)
        return self.score(both)[:, 0].float()
