"""Cross-entropy on the labels alone: the row that everything is compared with."""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from annotated_types import Ge, Lt

from modicum.data.stream import Batch
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class Supervised(SemiSupervised):
    """The network learns the labels, on a frozen backbone its linear head."""

    views: ClassVar = {"labelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        label_smoothing: Annotated[float, Ge(0), Lt(1), "share of the target spread over all classes"] = 0.0,
    ) -> None:
        super().__init__(backbone, facts)
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> Loss:
        labelled = batch["labelled"]
        (logits,) = self.together(labelled.view(0))
        return Loss(F.cross_entropy(logits, labelled.labels, label_smoothing=self.label_smoothing))
