"""Which of a teacher's pseudo-labels count, and how often (Xie 2020, arXiv:1911.04252, section 3.1)."""

import torch
from torch import Tensor

MOST_COPIES = 10.0  # of an image of a rare class; the paper sets no limit, and two images would then stand for a thousand


@torch.no_grad()
def selection(probabilities: Tensor, threshold: float, *, balance: bool) -> Tensor:
    """How often each image counts (N,), by the teacher's probabilities (N, C): 0 from below `threshold`, 1 in the mean.

    Balanced, all classes count for as much as the mean class has images: of a class with more, the surest images do, and of one
    with fewer, all do several times.
    """
    num_classes = probabilities.shape[1]
    confidence, guess = probabilities.max(dim=1)
    weight = (confidence >= threshold).to(probabilities.dtype)
    if balance:
        kept = torch.nonzero(weight)[:, 0]
        kept = kept[torch.argsort(confidence[kept], descending=True, stable=True)]
        kept = kept[torch.argsort(guess[kept], stable=True)]  # class by class, the surest first
        counts = torch.bincount(guess[kept], minlength=num_classes)
        place = torch.arange(len(kept), device=kept.device) - (counts.cumsum(0) - counts)[guess[kept]]  # within the class
        quota = len(kept) / num_classes
        copies = (quota / counts[guess[kept]]).clamp(1, MOST_COPIES).to(weight.dtype)
        weight[kept] = torch.where(place < quota, copies, 0)
    return weight * (len(weight) / weight.sum().clamp_min(1))
