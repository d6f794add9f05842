"""The last embeddings and class probabilities of images, of all ranks, that guesses are smoothed by."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum import distributed
from modicum.hardware import in_full_precision

attention = in_full_precision(F.scaled_dot_product_attention)


class Memory(nn.Module):
    """A ring of `size` pairs; the oldest are overwritten. It starts with embeddings of length zero and equal classes."""

    embeddings: Tensor  # (K, D)
    probabilities: Tensor  # (K, C)
    pointer: Tensor  # int64 ()

    def __init__(self, size: int, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, num_features))
        self.register_buffer("probabilities", torch.full((size, num_classes), 1 / num_classes))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor, probabilities: Tensor) -> None:
        """Takes in pairs (N, D), (N, C) of every rank; of more than fit the last ones."""
        size = len(self.embeddings)
        embeddings, probabilities = distributed.gather(embeddings)[-size:], distributed.gather(probabilities)[-size:]
        places = (self.pointer + torch.arange(len(embeddings), device=embeddings.device)) % size
        self.embeddings.index_copy_(0, places, embeddings)
        self.probabilities.index_copy_(0, places, probabilities)
        self.pointer.add_(len(embeddings)).remainder_(size)

    @torch.no_grad()
    def smooth(self, embeddings: Tensor, probabilities: Tensor, temperature: float, share: float) -> Tensor:
        """`share` of probabilities (N, C), the rest from the memory, weighted by softmax(similarity / T) (arXiv:2011.11183, equation 4)."""
        remembered = attention(embeddings, self.embeddings, self.probabilities, scale=1 / temperature)
        return share * probabilities + (1 - share) * remembered
