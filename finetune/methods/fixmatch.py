"""FixMatch (Sohn 2020, arXiv:2001.07685); with `teacher: {norm: eman}` it is FixMatch-EMAN (Cai 2021, arXiv:2101.08482)."""

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from torch import Tensor

from modicum.data.stream import Sample
from modicum.errors import InputError
from modicum.finetune.alignment import DistributionAlignment, Prior
from modicum.finetune.semi_supervised import TeacherOrNone
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Decisions, Facts
from modicum.networks import Backbone


class FixMatch(WeakToStrong):
    """A confident prediction on a weak view is the label of the strong view of the same image."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a prediction counts as a label"] = 0.95,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        distribution_alignment: Annotated[
            Prior, "how often guesses are made to name each class: none, uniform, labelled, estimated, or shares"
        ] = "none",
        weak_in_batch: Annotated[bool, "weak views go through the student's one pass, as in the original code"] = False,
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.lambda_u, self.weak_in_batch = threshold, lambda_u, weak_in_batch
        self.align = DistributionAlignment(distribution_alignment, facts)

    def predict(self, labelled: Sample, unlabelled: Sample) -> tuple[Tensor, Tensor, Tensor]:
        if not self.weak_in_batch:
            return super().predict(labelled, unlabelled)
        logits, strong, weak = self.together(labelled.view(0), unlabelled.view(1), unlabelled.view(0))
        return logits, strong, weak.detach().softmax(dim=1)

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        targets = self.align(targets)
        return targets, (targets.amax(dim=1) >= self.threshold).float()

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        if settings["weak_in_batch"] and settings["teacher"] != "none":
            raise InputError("finetune.method.weak_in_batch = true is for teacher: none; a teacher predicts in a pass of its own.")
        return super().decide(settings, facts)
