"""SoftMatch (Chen 2023, arXiv:2301.10921)."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Sample
from modicum.finetune.alignment import DistributionAlignment, Prior, RunningMean
from modicum.finetune.semi_supervised import TeacherOrNone
from modicum.finetune.thresholds import truncated_gaussian
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone
from modicum.settings import AUTO


class SoftMatch(WeakToStrong):
    """FixMatch in which every guess counts, the less the further its confidence lies below the running mean."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        sigmas: Annotated[float, Gt(0), "how steeply weights fall: deviations of the weight within one of the confidence"] = 2.0,
        distribution_alignment: Annotated[
            Prior, "of guesses whose confidence is measured, not of those learnt; as in fixmatch"
        ] = "uniform",
        momentum: Annotated[float, Ge(0), Lt(1), "of the running mean and variance of the confidence"] = AUTO,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.lambda_u, self.sigmas = lambda_u, sigmas
        self.align_confidence = DistributionAlignment(distribution_alignment, facts, momentum)
        self.confidence = RunningMean(torch.tensor(1 / facts.num_classes), momentum)
        self.variance = RunningMean(torch.tensor(1.0), momentum)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        confidence = self.align_confidence(targets).amax(dim=1)  # alignment weighs; what is learnt is the guess itself
        everywhere = distributed.gather(confidence)
        variance = self.variance(everywhere.var(correction=min(1, len(everywhere) - 1))[None])  # of one image 0
        mean = self.confidence(confidence)
        return targets, truncated_gaussian(confidence, mean, variance, self.sigmas)
