"""FreeMatch (Wang 2023, arXiv:2205.07246)."""

from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Sample
from modicum.finetune.alignment import RunningMean
from modicum.finetune.losses import fairness
from modicum.finetune.semi_supervised import Guesses, TeacherOrNone
from modicum.finetune.thresholds import self_adaptive
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone
from modicum.settings import AUTO


class FreeMatch(WeakToStrong):
    """FixMatch with thresholds that follow the running confidence, of all and of each class, and a term against neglected classes."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        lambda_f: Annotated[float, Ge(0), "weight of the fairness between classes"] = 0.01,
        momentum: Annotated[float, Ge(0), Lt(1), "of the running confidence and classes"] = AUTO,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.lambda_u, self.lambda_f = lambda_u, lambda_f
        even = torch.full((facts.num_classes,), 1 / facts.num_classes)
        self.confidence = RunningMean(even.mean(), momentum)
        self.classes = RunningMean(even, momentum)
        self.histogram = RunningMean(even.clone(), momentum)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        confidence, guess = targets.max(dim=1)
        thresholds = self_adaptive(self.confidence(confidence), self.classes(targets))
        self.histogram(torch.zeros_like(targets).scatter_(1, guess[:, None], 1))
        return targets, (confidence >= thresholds[guess]).float()

    def teach(self, strong: Tensor, guesses: Guesses) -> dict[str, Tensor]:
        everyone = distributed.gather(strong), distributed.gather(guesses.used)
        return super().teach(strong, guesses) | {"fairness": fairness(*everyone, self.classes.mean, self.histogram.mean)}

    def weights(self) -> dict[str, float]:
        return {"unlabelled": self.lambda_u, "fairness": self.lambda_f}
