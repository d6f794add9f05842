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
def in_batch_info_nce(queries: Tensor, all_keys: Tensor, offset: int, temperature: float) -> Tensor:
    """Each query (N, D) against the keys of the batch (M, D), its own from row `offset` on, times 2 T (arXiv:2104.02057, algorithm 1)."""
    logits = queries @ all_keys.T / temperature  # (N, M)
    own = offset + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(logits, own)


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


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """-cos of each prediction (N, D) to its target (N, D) (arXiv:2011.10566, equation 1)."""
    return -F.cosine_similarity(predictions, targets, dim=1).mean()


@in_full_precision
def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """(D, D): correlation of every column of `first` with every column of `second` (N, D) over all N (arXiv:2103.03230, equation 2)."""
    first, second = (F.normalize(z - z.mean(dim=0), dim=0) for z in (first, second))
    return first.T @ second


@in_full_precision
def covariance(z: Tensor) -> Tensor:
    """(D, D): covariance of the columns of `z` (N, D), over N - 1 (arXiv:2105.04906, equation 3)."""
    centred = z - z.mean(dim=0)
    return centred.T @ centred / (len(z) - 1)


def off_diagonal_squares(matrix: Tensor) -> Tensor:
    """Sum of the squares of a matrix (D, D) beside its diagonal."""
    return (matrix - matrix.diagonal().diag()).square().sum()


@in_full_precision
def anisotropy(features: Tensor) -> Tensor:
    """How unevenly `features` (N, D) vary, 0 if alike in every direction: |C / t - 1|^2 / D, with C their covariance, t its mean variance.

    C / t is 1 for features that whitening would leave as they are. Kin to VICReg's covariance term (arXiv:2105.04906, equation 4).
    """
    shared = covariance(features)
    identity = torch.eye(len(shared), dtype=shared.dtype, device=shared.device)
    return (shared / shared.diagonal().mean().clamp_min(1e-12) - identity).square().sum() / len(shared)


def lacking_deviation(z: Tensor) -> Tensor:
    """By how much the standard deviation of a column of `z` (N, D) falls short of 1, on average (arXiv:2105.04906, equations 1 and 2)."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


@in_full_precision
def cosines(embeddings: Tensor, directions: Tensor) -> Tensor:
    """(N, K): cosine of each embedding (N, D) to each direction (K, D)."""
    return F.normalize(embeddings, dim=1) @ F.normalize(directions, dim=1).T


@in_full_precision
def sinkhorn(scores: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Codes (N, K) from scores (N, K): each row a distribution, all prototypes used alike (arXiv:2006.09882, equations 3 to 5)."""
    codes = scores / epsilon  # in logarithms: for a small epsilon whole rows and columns would be zeros
    for _ in range(rounds):
        codes = F.log_softmax(F.log_softmax(codes, dim=0), dim=1)
    return codes.exp()


def across_views(logits: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean cross-entropy of the target distribution of each of the first views to the predictions of every *other* view, (N, K) each.

    arXiv:2006.09882, equations 1 and 6; arXiv:2104.14294, equation 3.
    """
    predictions = [F.log_softmax(view, dim=1) for view in logits]
    pairs = [(target, predictions[v]) for t, target in enumerate(targets) for v in range(len(predictions)) if v != t]
    return torch.stack([-(target * prediction).sum(dim=1).mean() for target, prediction in pairs]).mean()


@in_full_precision
def whiten(z: Tensor, shrinkage: float) -> Tensor:
    """`z` (N, D) moved and turned so that its mean is 0 and its covariance the identity (arXiv:2007.06346, section 3).

    `shrinkage` mixes the identity into the covariance first. Where that is singular the result is not finite: the device is not asked.
    """
    centred = z - z.mean(dim=0)
    shrunk = (1 - shrinkage) * covariance(z) + shrinkage * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    triangle, _ = torch.linalg.cholesky_ex(shrunk)
    return torch.linalg.solve_triangular(triangle, centred.T, upper=False).T
