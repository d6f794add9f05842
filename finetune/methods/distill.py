"""Distillation of a fine-tuned teacher: the third step of SimCLR v2 (Chen 2020, arXiv:2006.10029)."""

from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import nn

from modicum.checkpoint import load_classifier
from modicum.data.stream import Batch
from modicum.finetune.losses import distillation
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class Distill(SemiSupervised):
    """The student learns what a frozen classifier says of the same view of every image; the labels may join in."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        teacher_from: Annotated[str | None, "folder of the teacher's classifier; none: the run first fine-tunes one on the labels"] = None,
        temperature: Annotated[float, Gt(0), "divides the logits of teacher and student; above 1 smooths"] = 1.0,
        alpha: Annotated[float, Ge(0), Le(1), "weight of the distillation; the labels have the rest"] = 1.0,
    ) -> None:
        super().__init__(backbone, facts)
        assert teacher_from is not None, "the stage names one"
        teacher, _, _ = load_classifier(Path(teacher_from))
        self.teacher = nn.Sequential(teacher.backbone, teacher.head).requires_grad_(False)  # not a classifier that this run trains
        self.temperature, self.alpha = temperature, alpha

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, others = self.together(labelled.view(0), unlabelled.view(0))
        with torch.no_grad():
            told = self.teacher(torch.cat([labelled.view(0), unlabelled.view(0)])).float()
        guesses = told[len(logits) :].softmax(dim=1)
        self.guesses = Guesses(unlabelled.rows, guesses, torch.ones_like(guesses[:, 0]))
        parts = {
            "labelled": F.cross_entropy(logits, labelled.labels),
            "distillation": distillation(torch.cat([logits, others]), told, self.temperature),
        }
        return Loss((1 - self.alpha) * parts["labelled"] + self.alpha * parts["distillation"], parts)
