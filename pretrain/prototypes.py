"""Learned directions that embeddings are compared with, as SwAV and DINO have them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.pretrain.losses import cosines


class Prototypes(nn.Module):
    """Embeddings (N, D) -> their cosines to `number` learned directions (N, number), in full precision."""

    def __init__(self, dimensions: int, number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(number, dimensions), dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        return cosines(embeddings.to(self.weight.dtype), self.weight)
