"""UDA, unsupervised data augmentation (Xie 2020, arXiv:1904.12848)."""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Sample
from modicum.finetune.losses import annealed_labels, sharpen, soft_label
from modicum.finetune.semi_supervised import Guesses, TeacherOrNone
from modicum.finetune.thresholds import Annealing, signal_annealing
from modicum.finetune.weak_to_strong import WeakToStrong
from modicum.method import Facts
from modicum.networks import Backbone


class UDA(WeakToStrong):
    """The strong view learns the sharpened prediction of a confident weak one; labels that are learnt wait for the others."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which a prediction counts"] = 0.8,
        temperature: Annotated[float, Gt(0), "below 1 sharpens the predictions that are learnt"] = 0.4,
        lambda_u: Annotated[float, Ge(0), "weight of the unlabelled loss"] = 1.0,
        annealing: Annotated[Annealing, "how the probability rises from which on a label waits; exp lets go last"] = "linear",
        teacher: Annotated[TeacherOrNone, "who predicts on weak views; none: the student itself"] = "none",
    ) -> None:
        super().__init__(backbone, facts, teacher)
        self.threshold, self.temperature, self.lambda_u = threshold, temperature, lambda_u
        self.annealing, self.num_classes = annealing, facts.num_classes

    def judge(self, targets: Tensor, unlabelled: Sample, logits: Tensor) -> tuple[Tensor, Tensor]:
        return targets, (targets.amax(dim=1) >= self.threshold).float()

    def supervise(self, logits: Tensor, labels: Tensor) -> Tensor:
        ceiling = signal_annealing(self.progress.fraction, self.num_classes, self.annealing)
        return annealed_labels(distributed.gather(logits), distributed.gather(labels), ceiling)

    def teach(self, strong: Tensor, guesses: Guesses) -> dict[str, Tensor]:
        return {"unlabelled": soft_label(strong, sharpen(guesses.probabilities, self.temperature), guesses.used)}
