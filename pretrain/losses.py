"""Losses of stage one: pure functions of embeddings, one row (N, D) an image. They normalise to unit length where the paper does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.hardware import in_full_precision


@in_full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Each query (N, D) against its key (N, D) and all `negatives` (K, D), rows of unit length (arXiv:1911.05722, equation 1)."""
    positive = (queries * keys).sum(dim=1, keepdim=True)  # (N, 1)
    logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature  # (N, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


@in_full_precision
def nt_xent(first: Tensor, second: Tensor, all_first: Tensor, all_second: Tensor, offset: int, temperature: float) -> Tensor:
    """Each of this rank's 2N embeddings against the other view of its image, among all 2M of all ranks (arXiv:2002.05709, equation 1).

    `first`, `second` (N, D) are rows `offset`... of `all_first`, `all_second` (M, D); all rows have unit length.
    """
    anchors, others = torch.cat([first, second]), torch.cat([all_first, all_second])
    mine = offset + torch.arange(len(first), device=first.device)
    logits = anchors @ others.T / temperature  # (2N, 2M)
    itself, partner = torch.cat([mine, mine + len(all_first)]), torch.cat([mine + len(all_first), mine])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, partner)


def regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 - 2 cos of each prediction (N, D) to its target (N, D) (arXiv:2006.07733, equation 2)."""
    return (2 - 2 * F.cosine_similarity(predictions, targets, dim=1)).mean()
