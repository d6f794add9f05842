"""Meta Pseudo Labels (Pham 2021, arXiv:2003.10580)."""

import copy
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Batch, Sample
from modicum.finetune.alignment import RunningMean
from modicum.finetune.losses import linear_ramp, sharpen, soft_label
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, aside, in_one_pass, remember
from modicum.method import Facts, Loss
from modicum.networks import Backbone, Classifier
from modicum.randomness import generator

BASELINE = 0.99  # momentum of the mean that gains are compared with, the authors'


class MetaPseudoLabels(SemiSupervised):
    """The student learns labels that a teacher draws, and the teacher, by UDA and by whether the student gained from its labels.

    The gain is the labelled loss before the student's update less that after it, which to first order is the paper's feedback
    coefficient h. It is known in the next step, in which the teacher learns from the batch that the student had in this one.
    """

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak", "strong")}
    target_views: ClassVar = {"unlabelled": (0,)}
    teacher: Classifier
    drawn: Tensor  # int64 (unlabelled images,): the class last drawn for each
    before: Tensor  # (): labelled loss of the student before its last update

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        threshold: Annotated[float, Gt(0), Le(1), "confidence from which the teacher learns its own sharpened prediction"] = 0.6,
        temperature: Annotated[float, Gt(0), "below 1 sharpens the predictions that the teacher learns"] = 0.7,
        lambda_u: Annotated[float, Ge(0), "weight of the teacher's unlabelled loss, once it has risen"] = 8.0,
        ramp_up: Annotated[float, Ge(0), Le(1), "share of the run in which that weight rises"] = 0.0167,
        label_smoothing: Annotated[float, Ge(0), Lt(1), "of the teacher's labels and of those it draws"] = 0.15,
        finetuning: Annotated[float, Ge(0), Lt(1), "share of the run, its last, in which the student learns the given labels alone"] = 0.1,
    ) -> None:
        super().__init__(backbone, facts)
        self.threshold, self.temperature, self.lambda_u, self.ramp_length = threshold, temperature, lambda_u, ramp_up
        self.label_smoothing, self.finetuning, self.seed = label_smoothing, finetuning, seed
        self.teacher = Classifier(copy.deepcopy(backbone), facts.num_classes)
        self.baseline = RunningMean(torch.tensor(0.0), BASELINE)
        self.register_buffer("drawn", torch.zeros(facts.num_unlabelled, dtype=torch.int64))
        self.register_buffer("before", torch.tensor(0.0))

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        past_labelled, past = labelled.previous(), unlabelled.previous()
        gain = self.before - self.labelled_loss(past_labelled) if self.progress.step else torch.zeros_like(self.before)
        feedback = gain - self.baseline(gain[None])
        taught = self.drawn[past.positions]
        self.before.copy_(self.labelled_loss(labelled))

        probabilities = aside(self.teacher, unlabelled.view(1)).float().softmax(dim=1)
        drawn = self.draw(probabilities)
        remember(self.drawn, unlabelled, drawn)
        self.guesses = Guesses(unlabelled.rows, probabilities, torch.ones_like(probabilities[:, 0]))

        known, strong = self.together(labelled.view(0), unlabelled.view(1))
        teacher_known, teacher_strong = (part.float() for part in in_one_pass(self.teacher, past_labelled.view(0), past.view(1)))
        targets = sharpen(aside(self.teacher, past.view(0)).float().softmax(dim=1), self.temperature)
        used = (targets.amax(dim=1) >= self.threshold).float()
        parts = {
            "student": F.cross_entropy(strong, drawn, label_smoothing=self.label_smoothing),
            "labelled": F.cross_entropy(known, labelled.labels),
            "teacher_labelled": F.cross_entropy(teacher_known, past_labelled.labels, label_smoothing=self.label_smoothing),
            "teacher_unlabelled": soft_label(teacher_strong, targets, used),
            # The labels are drawn ones: a cross-entropy to the teacher's own probabilities would have no gradient.
            "feedback": feedback * F.cross_entropy(teacher_strong, taught),
        }
        ramp = linear_ramp(self.progress.fraction, 0, self.ramp_length)
        student = parts["labelled"] if self.progress.fraction >= 1 - self.finetuning else parts["student"]
        teacher = parts["teacher_labelled"] + self.lambda_u * ramp * parts["teacher_unlabelled"] + parts["feedback"]
        return Loss(student + teacher, parts)

    def draw(self, probabilities: Tensor) -> Tensor:
        """A class (N,) for each image, drawn from its probabilities (N, C)."""
        draws = generator(self.seed, "meta_pseudo_labels", self.progress.step)
        levels = distributed.drawn_for_all(len(probabilities), lambda size: torch.rand(size, 1, generator=draws))
        passed = probabilities.cumsum(dim=1) < levels.to(probabilities.device)
        return passed.sum(dim=1).clamp_max(probabilities.shape[1] - 1)

    def labelled_loss(self, sample: Sample) -> Tensor:
        """The student's, as it is now, over the images of all ranks, normalised by themselves alone."""
        loss = F.cross_entropy(aside(self.student, sample.view(0)).float(), sample.labels)
        return distributed.gather(loss[None]).mean()
