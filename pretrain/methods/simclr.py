"""SimCLR: contrast with all other images of the batch (Chen 2020, arXiv:2002.05709)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.method import Decisions, Facts, Loss, Method, Recipe
from modicum.networks import Backbone, mlp
from modicum.networks.stems import SMALL_IMAGE
from modicum.pretrain.losses import anisotropy, nt_xent
from modicum.settings import AUTO


class SimCLR(Method):
    """Two views of an image must find each other among all views of the batch, on all ranks."""

    student: nn.Sequential  # backbone, head
    views: ClassVar = {"unlabelled": ("simclr", "simclr")}
    one_size: ClassVar = True
    recipe: ClassVar = Recipe("lars", lr=0.3, sqrt_lr=1.2, weight_decay=1e-6, warmup=0.1)  # 0.3 B / 256, or 0.075 sqrt(B)
    collapse_causes: ClassVar = {"pretrain.method.temperature": "too high", "pretrain.batch_size": "too small"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "divides the cosine similarities"] = AUTO,
        embedding_size: Annotated[int, Ge(2), "dimensions of the embeddings"] = 128,
        head_layers: Annotated[int, Ge(1), "linear layers of the head"] = 2,
        isotropy_weight: Annotated[float, Ge(0), "of how unevenly the backbone's features vary; the paper has none"] = 0.0,
    ) -> None:
        super().__init__()
        head = mlp(backbone.num_features, backbone.num_features, embedding_size, num_layers=head_layers, norm=True)
        self.student = nn.Sequential(backbone, head)
        self.temperature, self.isotropy_weight = temperature, isotropy_weight

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        both = torch.cat([images.view(0), images.view(1)])
        features = self.student[0](both)
        z = F.normalize(self.student[1](features).float(), dim=1)  # (2N, D)
        first, second = z.chunk(2)
        offset = distributed.rank() * len(first)
        contrast = nt_xent(first, second, distributed.gather(first), distributed.gather(second), offset, self.temperature)
        if not self.isotropy_weight:
            return Loss(contrast)
        uneven = self.isotropy_weight * anisotropy(distributed.gather(features.float()))
        return Loss(contrast + uneven, {"contrast": contrast, "anisotropy": uneven})

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        small = facts.image_size <= SMALL_IMAGE
        papers = (0.5, "the paper's for small images") if small else (0.1, "the paper's for large images")
        return {"temperature": papers} if settings["temperature"] == AUTO else {}
