"""Barlow Twins: decorrelated dimensions (Zbontar 2021, arXiv:2103.03230)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.method import Decisions, Facts, Loss, Method, Recipe, decide_width
from modicum.networks import Backbone, mlp
from modicum.pretrain.losses import cross_correlation, off_diagonal_squares
from modicum.settings import AUTO


class BarlowTwins(Method):
    """The correlation of two views' embeddings, over the images of all ranks, must be the identity."""

    views: ClassVar = {"unlabelled": ("byol_a", "byol_b")}
    recipe: ClassVar = Recipe("lars", lr=0.2, weight_decay=1.5e-6, warmup=0.01)
    collapse_causes: ClassVar = {"pretrain.method.redundancy_weight": "too low"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        redundancy_weight: Annotated[float, Gt(0), "weighs the correlations of unlike dimensions"] = 5e-3,
        embedding_size: Annotated[int, Ge(2), "dimensions of the embeddings, and width of the projector"] = AUTO,
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, mlp(backbone.num_features, embedding_size, embedding_size, num_layers=3, norm=True))
        self.redundancy_weight = redundancy_weight

    def forward(self, batch: Batch) -> Loss:
        first, second = (distributed.gather(self.student(batch["unlabelled"].view(number)).float()) for number in (0, 1))
        correlation = cross_correlation(first, second)  # (D, D)
        invariance = (1 - correlation.diagonal()).square().sum()
        redundancy = self.redundancy_weight * off_diagonal_squares(correlation)
        return Loss(invariance + redundancy, {"invariance": invariance, "redundancy": redundancy})

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        return {"embedding_size": decide_width(8192, 1024, facts.image_size)} if settings["embedding_size"] == AUTO else {}
