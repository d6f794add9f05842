"""Virtual adversarial training (Miyato 2018, arXiv:1704.03976)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt

from modicum import distributed
from modicum.data.stream import Batch
from modicum.finetune.adversarial import adversarial_direction
from modicum.finetune.losses import consistency, entropy
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Decisions, Facts, Loss
from modicum.networks import Backbone
from modicum.randomness import generator
from modicum.settings import AUTO
from modicum.teacher import untouched_statistics


class VAT(SemiSupervised):
    """The prediction must stand the small change of the image that moves it most; and it should be sure."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        radius: Annotated[float, Gt(0), "length of the change, in normalised pixels"] = AUTO,
        xi: Annotated[float, Gt(0), "length of the trial step of the power iteration"] = 1e-2,
        iterations: Annotated[int, Ge(1), "rounds of the power iteration"] = 1,
        lambda_u: Annotated[float, Ge(0), "weight of the adversarial loss"] = 1.0,
        lambda_e: Annotated[float, Ge(0), "weight of the entropy"] = 1.0,
    ) -> None:
        super().__init__(backbone, facts)
        self.radius, self.xi, self.iterations = radius, xi, iterations
        self.lambda_u, self.lambda_e, self.seed = lambda_u, lambda_e, seed

    def forward(self, batch: Batch) -> Loss:
        labelled, images = batch["labelled"], batch["unlabelled"].view(0)
        draws = generator(self.seed, "vat", self.progress.step)
        start = distributed.drawn_for_all(len(images), lambda size: torch.randn(size, *images.shape[1:], generator=draws))
        with untouched_statistics(self.student):
            direction = adversarial_direction(images.detach(), start.to(images.device), self.student, self.xi, self.iterations)
        logits, clean, moved = self.together(labelled.view(0), images, images + self.radius * direction)
        parts = {
            "labelled": F.cross_entropy(logits, labelled.labels),
            "adversarial": consistency(moved, clean.softmax(dim=1), "kl"),
            "entropy": entropy(clean),
        }
        return Loss(parts["labelled"] + self.lambda_u * parts["adversarial"] + self.lambda_e * parts["entropy"], parts)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions = super().decide(settings, facts)
        if settings["radius"] == AUTO:
            decisions["radius"] = round(8 * facts.image_size / 32, 2), "the paper's 8 for 32 px, in proportion to the side"
        return decisions
