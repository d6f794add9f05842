"""Variance, invariance, covariance (Bardes 2021, arXiv:2105.04906)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.method import Decisions, Facts, Loss, Method, Recipe, decide_width
from modicum.networks import Backbone, mlp
from modicum.pretrain.losses import covariance, lacking_deviation, off_diagonal_squares
from modicum.settings import AUTO


class VICReg(Method):
    """Two views' embeddings must agree, while each dimension varies over the images of all ranks, and no two together."""

    views: ClassVar = {"unlabelled": ("byol_a", "byol_b")}
    recipe: ClassVar = Recipe("lars", lr=0.2, weight_decay=1e-6, warmup=0.01)
    collapse_causes: ClassVar = {"pretrain.method.variance_weight": "too low", "pretrain.method.covariance_weight": "too low"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        invariance_weight: Annotated[float, Gt(0), "of the distance between views"] = 25.0,
        variance_weight: Annotated[float, Gt(0), "of standard deviations below 1"] = 25.0,
        covariance_weight: Annotated[float, Gt(0), "of what two dimensions have in common"] = 1.0,
        embedding_size: Annotated[int, Ge(2), "dimensions of the embeddings, and width of the expander"] = AUTO,
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, mlp(backbone.num_features, embedding_size, embedding_size, num_layers=3, norm=True))
        self.weights = invariance_weight, variance_weight, covariance_weight

    def forward(self, batch: Batch) -> Loss:
        first, second = (distributed.gather(self.student(batch["unlabelled"].view(number)).float()) for number in (0, 1))
        parts = {
            "invariance": F.mse_loss(first, second),
            "variance": lacking_deviation(first) + lacking_deviation(second),
            "covariance": (off_diagonal_squares(covariance(first)) + off_diagonal_squares(covariance(second))) / first.shape[1],
        }
        parts = {name: weight * part for weight, (name, part) in zip(self.weights, parts.items(), strict=True)}
        return Loss(sum(parts.values(), first.new_zeros(())), parts)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        return {"embedding_size": decide_width(8192, 1024, facts.image_size)} if settings["embedding_size"] == AUTO else {}
