"""Pseudo-labelling with mixup, against confirmation bias (Arazo 2020, arXiv:1908.02983)."""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor

from modicum import distributed
from modicum.data.stream import Batch
from modicum.finetune.losses import entropy, prior_distance
from modicum.finetune.mixup import Mixing
from modicum.finetune.semi_supervised import Guesses, SemiSupervised, remember
from modicum.method import Facts, Loss
from modicum.networks import Backbone


class PseudoLabelMixup(SemiSupervised):
    """What an image was predicted to be when it was last seen is its soft label; all are mixed, and no class may be forgotten."""

    views: ClassVar = {"labelled": ("weak",), "unlabelled": ("weak",)}
    even: Tensor  # (C,)
    soft: Tensor  # (unlabelled images, C): the last prediction of each; zeros before the first

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        alpha: Annotated[float, Gt(0), "of the Beta distribution that shares are drawn from"] = 4.0,
        lambda_a: Annotated[float, Ge(0), "weight of the distance of the mean prediction from equal classes"] = 0.8,
        lambda_h: Annotated[float, Ge(0), "weight of the entropy"] = 0.4,
        warm_up: Annotated[float, Ge(0), Le(1), "share of the run in which labelled images alone are learnt"] = 0.1,
    ) -> None:
        super().__init__(backbone, facts)
        self.alpha, self.lambda_a, self.lambda_h, self.warm_up, self.seed = alpha, lambda_a, lambda_h, warm_up, seed
        self.register_buffer("soft", torch.zeros(facts.num_unlabelled, facts.num_classes))
        self.register_buffer("even", torch.full((facts.num_classes,), 1 / facts.num_classes))

    def forward(self, batch: Batch) -> Loss:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        now = self.targets(unlabelled, view=0)
        past = self.soft[unlabelled.positions]
        guesses = torch.where(past.sum(dim=1, keepdim=True) > 0, past, now)
        remember(self.soft, unlabelled, now)
        self.guesses = Guesses(unlabelled.rows, guesses, torch.ones_like(guesses[:, 0]))
        images = torch.cat([labelled.view(0), unlabelled.view(0)])
        targets = torch.cat([F.one_hot(labelled.labels, guesses.shape[1]).to(guesses.dtype), guesses])
        mix = Mixing(len(images), self.alpha, images.device, self.seed, "arazo", self.progress.step, distributed.rank())
        (logits,) = self.together(mix(images))
        losses = F.cross_entropy(logits, mix(targets), reduction="none")
        # While warming up, pairs that an unlabelled image is part of do not count.
        warming = self.progress.fraction < self.warm_up
        trusted = torch.arange(len(images), device=images.device) < len(labelled.labels)
        counts = (trusted & trusted[mix.partners]).to(losses.dtype) if warming else torch.ones_like(losses)
        parts = {
            "mixed": (losses * counts).sum() / counts.sum().clamp_min(1),
            "prior": prior_distance(distributed.gather(logits), self.even),
            "entropy": entropy(logits),
        }
        return Loss(parts["mixed"] + self.lambda_a * parts["prior"] + self.lambda_h * parts["entropy"], parts)
