"""Cross-entropy on the labels alone: the row that everything is compared with."""

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Ge, Lt

from modicum.data.stream import Batch
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class Supervised(SemiSupervised):
    """The whole network, or the linear head alone, learns the labels."""

    views: ClassVar = {"labelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        train: Annotated[Literal["all", "head"], "the whole network, or a linear head on a frozen backbone"] = "all",
        label_smoothing: Annotated[float, Ge(0), Lt(1), "share of the target spread over all classes"] = 0.0,
    ) -> None:
        super().__init__(backbone, facts)
        self.student.backbone.requires_grad_(train == "all")
        self.frozen = train == "head"
        self.label_smoothing = label_smoothing

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.frozen:
            self.student.backbone.eval()
        return self

    def forward(self, batch: Batch) -> Loss:
        labelled = batch["labelled"]
        (logits,) = self.together(labelled.view(0))
        return Loss(F.cross_entropy(logits, labelled.labels, label_smoothing=self.label_smoothing))
