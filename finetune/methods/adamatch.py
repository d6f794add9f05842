"""AdaMatch (Berthelot 2022, arXiv:2106.04732), in its semi-supervised form."""

import math
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Sample
from modicum.finetune.alignment import DistributionAlignment, Prior, RunningMean
from modicum.finetune.semi_supervised import TeacherOrNone
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone
from modicum.randomness import generator
from modicum.settings import AUTO
from modicum.teacher import untouched_statistics


class AdaMatch(WeakToStrong):
    """FixMatch whose threshold is relative to the confidence on labelled images, and whose guesses are aligned to theirs."""

    views: ClassVar = {"labelled": ("weak", "strong"), "unlabelled": ("weak", "strong")}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence that counts, as a share of the mean one on labelled images"] = 0.9,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss once it has risen"] = 1.0,
        distribution_alignment: Annotated[
            Prior | Literal["predicted"], "as in fixmatch; predicted: as often as on the labelled images"
        ] = "predicted",
        momentum: Annotated[float, Ge(0), Lt(1), "of the running class distributions"] = AUTO,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.lambda_u, self.seed = threshold, lambda_u, seed
        self.predicted = distribution_alignment == "predicted"
        # What is predicted on labelled images takes the prior's place in every step; their shares stand for it before and after.
        own: Prior = "labelled" if distribution_alignment == "predicted" else distribution_alignment
        self.align = DistributionAlignment(own, facts, momentum)
        self.prior = RunningMean(torch.full((facts.num_classes,), 1 / facts.num_classes), momentum)

    def predict(self, labelled: Sample, unlabelled: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """The labelled logits, weak and strong, lie somewhere between those normalised with the unlabelled images and without."""
        weak, strong_labelled, strong = self.together(labelled.view(0), labelled.view(1), unlabelled.view(1))
        joint = torch.cat([weak, strong_labelled])
        with untouched_statistics(self.student):
            alone = self.student(torch.cat([labelled.view(0), labelled.view(1)])).float()
        draws = generator(self.seed, "adamatch", self.progress.step)
        between = distributed.drawn_for_all(len(weak), lambda size: torch.rand(size, 2, weak.shape[1], generator=draws))
        return torch.lerp(alone, joint, torch.cat(between.unbind(1)).to(joint.device)), strong, self.targets(unlabelled, view=0)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        known = logits.chunk(2)[0].softmax(dim=1)  # of the weak views
        targets = self.align(targets, self.prior(known) if self.predicted else None)
        level = self.threshold * distributed.gather(known.amax(dim=1)).mean()
        return targets, (targets.amax(dim=1) >= level).float()

    def supervise(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().supervise(logits, labels.repeat(2))

    def weights(self) -> dict[str, float]:
        """Rises to the middle of the run (section 3.5)."""
        return {"unlabelled": self.lambda_u * (0.5 - math.cos(min(math.pi, 2 * math.pi * self.progress.fraction)) / 2)}
