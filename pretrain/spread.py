"""How embeddings lie on the sphere: pure functions of some images' embeddings, one row (N, D) an image, on the CPU."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 40  # of a histogram of cosines, over -1 .. 1


def deviation(z: Tensor) -> float:
    """Standard deviation of a coordinate of the embeddings `z` (N, D) at unit length, mean over coordinates, times sqrt(D).

    At 1 they are spread evenly over the sphere, at 0 they are one point (Chen & He 2021, arXiv:2011.10566, section 4.1, where it is
    compared with 1 / sqrt(D)).
    """
    return float(F.normalize(z, dim=1).std(dim=0).mean() * z.shape[1] ** 0.5)


def effective_rank(z: Tensor) -> float:
    """RankMe of `z` (N, D): exp of the entropy of its singular values, from 1 to min(N, D) (arXiv:2210.02885, equation 1)."""
    z = z.double()  # the squares of small singular values would drown in single precision
    squares = torch.linalg.eigvalsh(z.T @ z if z.shape[1] <= len(z) else z @ z.T)
    singular = squares.clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=torch.finfo(z.dtype).tiny) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def cosines_of_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of two views' embeddings (N, D): of the views of one image (N,), and of views of different images (N (N - 1),)."""
    cosines = (F.normalize(first, dim=1) @ F.normalize(second, dim=1).T).clamp(-1, 1)
    number = len(cosines)
    return cosines.diagonal(), cosines.flatten()[1:].view(number - 1, number + 1)[:, :-1].flatten()


def alignment(positives: Tensor) -> float:
    """Mean squared distance of an image's two views on the sphere, from their cosines (Wang & Isola 2020, arXiv:2005.10242, alpha = 2)."""
    return float((2 - 2 * positives).mean())


def uniformity(negatives: Tensor) -> float:
    """Log of the mean of exp(-2 d^2) over views of different images, d their distance on the sphere, from their cosines.

    0 where all are one point, near -4 where many dimensions are filled evenly (Wang & Isola 2020, arXiv:2005.10242, t = 2).
    """
    return float((4 * negatives - 4).exp().mean().log())


def histogram(cosines: Tensor) -> np.ndarray:
    """float64 (BINS,): share of `cosines` in each of BINS equal parts of -1 .. 1."""
    return (torch.histc(cosines, BINS, -1, 1) / len(cosines)).double().numpy()
