"""FlexMatch (Zhang 2021, arXiv:2110.08263)."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from modicum.data.stream import Sample
from modicum.finetune.semi_supervised import TeacherOrNone, remember
from modicum.finetune.thresholds import flexible
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone


class FlexMatch(WeakToStrong):
    """FixMatch with a threshold for each class, lower while few images are taken for the class with confidence."""

    last: Tensor  # int64 (unlabelled images,): the class each was last guessed with confidence; C: never

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence that counts as learnt, and the highest threshold"] = 0.95,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.lambda_u, self.num_classes = threshold, lambda_u, facts.num_classes
        self.register_buffer("last", torch.full((facts.num_unlabelled,), facts.num_classes))

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        confidence, guess = targets.max(dim=1)
        counts = confidence.new_zeros(self.num_classes + 1).index_add(0, self.last, torch.ones_like(self.last, dtype=confidence.dtype))
        thresholds = flexible(counts[:-1], counts[-1], self.threshold)
        remember(self.last, unlabelled, torch.where(confidence >= self.threshold, guess, self.last[unlabelled.positions]))
        return targets, (confidence >= thresholds[guess]).float()
