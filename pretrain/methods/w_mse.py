"""Whitening for self-supervised learning (Ermolov 2021, arXiv:2007.06346)."""

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.method import Decisions, Facts, Loss, Method, Recipe
from modicum.networks import Backbone, mlp
from modicum.pretrain.crops import by_size
from modicum.pretrain.losses import regression, whiten
from modicum.settings import AUTO


class WMSE(Method):
    """The views of an image must agree once their embeddings are whitened, in random parts of the batch of all ranks."""

    views: ClassVar = {"unlabelled": ("moco_v2", "moco_v2")}
    fewest_views: ClassVar = 2
    recipe: ClassVar = Recipe("adamw", lr=3e-3, weight_decay=1e-6, batch=512, warmup=0.005)
    collapse_causes: ClassVar = {"pretrain.method.shrinkage": "too high", "pretrain.method.sub_batch": "too small"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        sub_batch: Annotated[int, Ge(4), "images that are whitened together, or somewhat more where it does not divide the batch"] = AUTO,
        embedding_size: Annotated[int, Ge(2), "dimensions of the embeddings"] = AUTO,
        hidden_size: Annotated[int, Ge(2), "width of the head"] = 1024,
        shrinkage: Annotated[float, Ge(0), Lt(1), "share of the identity mixed into the covariance"] = 0.0,
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, mlp(backbone.num_features, hidden_size, embedding_size, norm=True))
        self.sub_batch, self.shrinkage = sub_batch, shrinkage

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        views = by_size(self.student, [images.view(number) for number in range(images.num_views)])
        z = [distributed.gather(view.float()) for view in views]  # (M, D) each
        parts = images.permutation().to(z[0].device).tensor_split(len(z[0]) // self.sub_batch)
        whitened = [torch.cat([whiten(view[part], self.shrinkage) for part in parts]) for view in z]
        return Loss(torch.stack([regression(one, other) for one, other in combinations(whitened, 2)]).mean())

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions: Decisions = {}
        sub_batch, dimensions = settings["sub_batch"], settings["embedding_size"]
        if sub_batch == AUTO:
            if facts.batch_size < 4:
                raise InputError(f"pretrain.batch_size = {facts.batch_size} is too few images for w_mse to whiten; choose 4 or more.")
            sub_batch = min(128, facts.batch_size)
            decisions["sub_batch"] = sub_batch, "the paper's 128, or the batch where it is smaller"
        if sub_batch > facts.batch_size:
            raise InputError(
                f"pretrain.method.sub_batch = {sub_batch} is larger than batch_size = {facts.batch_size}; use at most that, or auto."
            )
        if dimensions == AUTO:
            decisions["embedding_size"] = min(64, sub_batch // 2), "the paper's 64, or half of sub_batch where that is less"
        elif dimensions >= sub_batch:
            raise InputError(
                f"pretrain.method.embedding_size = {dimensions} cannot be whitened over sub_batch = {sub_batch} images, whose "
                f"covariance is singular; use {sub_batch // 2} or less, or auto."
            )
        return decisions
