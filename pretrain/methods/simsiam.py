"""Simple Siamese networks: no negatives, no teacher, a stopped gradient (Chen 2020, arXiv:2011.10566)."""

from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import nn

from modicum.data.stream import Batch
from modicum.method import Facts, Loss, Method, Recipe
from modicum.networks import Backbone, mlp
from modicum.optim import Pace
from modicum.pretrain.losses import negative_cosine


class SimSiam(Method):
    """A predictor on one view's embedding must hit the other view's embedding, which is held still."""

    views: ClassVar = {"unlabelled": ("moco_v2", "moco_v2")}
    recipe: ClassVar = Recipe("sgd", lr=0.05, weight_decay=1e-4)
    collapse_causes: ClassVar = {
        "pretrain.batch_size": "too small for batch norm",
        "backbone.name": "too small for the data, or without batch norm",
    }

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        embedding_size: Annotated[int, Ge(4), "dimensions of the embeddings, and width of the projector"] = 2048,
        bottleneck: Annotated[int, Ge(1), "the predictor's middle layer has the embeddings' dimensions divided by this"] = 4,
    ) -> None:
        super().__init__()
        projector = mlp(backbone.num_features, embedding_size, embedding_size, num_layers=3, norm=True)
        self.student = nn.Sequential(backbone, projector, nn.BatchNorm1d(embedding_size, affine=False))
        self.predictor = mlp(embedding_size, max(1, embedding_size // bottleneck), embedding_size, norm=True)
        self.paces = {"predictor": Pace(scheduled=False)}  # section 4.2: it must keep up with embeddings that still move

    def forward(self, batch: Batch) -> Loss:
        z = [self.student(batch["unlabelled"].view(number)).float() for number in (0, 1)]  # (N, D) each
        p = [self.predictor(embedding).float() for embedding in z]
        return Loss((negative_cosine(p[0], z[1].detach()) + negative_cosine(p[1], z[0].detach())) / 2)
