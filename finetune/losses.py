"""Losses of stage two: pure functions of logits or probabilities (N, C)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modicum.hardware import in_full_precision


@in_full_precision
def similarities(first: Tensor, second: Tensor) -> Tensor:
    """(N, M): the product of each row of `first` (N, D) with each of `second` (M, D), in float32 also under autocast."""
    return first @ second.T


def pseudo_label(logits: Tensor, guesses: Tensor, used: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C) to guessed classes (N,), averaged over all N with those not `used` (N,) as zeros.

    FixMatch (arXiv:2001.07685), equation 4.
    """
    return (F.cross_entropy(logits, guesses, reduction="none") * used).mean()


def consistency(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Distance of predictions, given as logits (N, C), to target probabilities (N, C).

    `mse`: mean over images and classes of the squared difference of probabilities; it saturates where the two disagree most.
    `kl`: mean over images of KL(target || prediction) with the target held fixed; it does not.
    """
    if kind == "mse":
        return F.mse_loss(logits.softmax(dim=1), targets)
    return F.kl_div(logits.log_softmax(dim=1), targets.detach(), reduction="batchmean")


def entropy(logits: Tensor) -> Tensor:
    """Mean over images of H(p) of logits (N, C), in nats (Grandvalet 2004, equation 6)."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1).mean()


def soft_label(logits: Tensor, targets: Tensor, used: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C) to probabilities (N, C), averaged over all N with those not `used` (N,) as zeros.

    UDA (arXiv:1904.12848), equation 1, less the entropy of the targets, which has no gradient.
    """
    return (F.cross_entropy(logits, targets, reduction="none") * used).mean()


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmax(logits / T) to softmax(teacher / T), both given as logits (N, C), mean over N.

    SimCLR v2 (arXiv:2006.10029), equation 2; it has no factor T^2, so that a high T also makes gradients small.
    """
    return F.cross_entropy(logits / temperature, (teacher / temperature).softmax(dim=1))


def annealed_labels(logits: Tensor, labels: Tensor, ceiling: float) -> Tensor:
    """Cross-entropy of logits (N, C) to labels (N,), over those that are not yet right with more than `ceiling` (arXiv:1904.12848, 3.2)."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    waiting = (torch.exp(-losses.detach()) <= ceiling).to(losses.dtype)
    return (losses * waiting).sum() / waiting.sum().clamp_min(1)


def fairness(logits: Tensor, used: Tensor, classes: Tensor, histogram: Tensor) -> Tensor:
    """Minus the cross-entropy of the strong views' mean prediction to that of weak ones, each over its class histogram.

    FreeMatch (arXiv:2205.07246), equations 10 and 11: `logits` (N, C), `used` (N,); `classes` and `histogram` (C,) are running means
    of predictions and guessed classes on weak views. Classes that no used strong view is taken for are left out.
    """
    share = used / used.sum().clamp_min(1)
    mean = (logits.softmax(dim=1) * share[:, None]).sum(dim=0)
    counted = torch.zeros_like(mean).index_add(0, logits.argmax(dim=1), share)
    target = classes / histogram.clamp_min(1e-6)
    own = torch.where(counted > 0, mean / counted.clamp_min(1e-6), 0)
    own = own / own.sum().clamp_min(1e-12)
    logs = torch.where(counted > 0, own.clamp_min(1e-12).log(), 0)
    return (target / target.sum() * logs).sum()


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) (N, C), normalised (MixMatch, arXiv:1905.02249, equation 7)."""
    return (probabilities.clamp_min(1e-12).log() / temperature).softmax(dim=1)


def squared_error(logits: Tensor, targets: Tensor, used: Tensor) -> Tensor:
    """Squared difference of probabilities, of logits (N, C) to targets (N, C), averaged over classes and all N, those not `used` as zeros.

    MixMatch (arXiv:1905.02249), equation 4.
    """
    return ((logits.softmax(dim=1) - targets).square().mean(dim=1) * used).mean()


def prior_distance(logits: Tensor, prior: Tensor) -> Tensor:
    """KL(prior || mean prediction) of logits (N, C) and prior (C,) (Arazo 2020, arXiv:1908.02983, equation 2)."""
    mean = logits.softmax(dim=1).mean(dim=0)
    return (prior * (prior / mean.clamp_min(1e-12)).log()).sum()


def embedding_cross_entropy(likeness: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmax(likeness / T) (N, M) to rows of `targets` (N, M) that sum to 1, mean over N.

    CoMatch (arXiv:2011.11183), equation 8; SimMatch (arXiv:2203.06915), equation 6.
    """
    return F.cross_entropy(likeness / temperature, targets)


def pseudo_label_graph(probabilities: Tensor, threshold: float) -> Tensor:
    """Rows (N, N) summing to 1: 1 for an image itself, p_i . p_j for others from `threshold` on (arXiv:2011.11183, equation 6)."""
    graph = similarities(probabilities, probabilities)
    graph = torch.where(graph >= threshold, graph, 0)
    itself = torch.eye(len(graph), dtype=graph.dtype, device=graph.device)
    graph = graph * (1 - itself) + itself
    return graph / graph.sum(dim=1, keepdim=True)


def shrunk_label(logits: Tensor, guesses: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of logits (N, C) to classes (N,) among those `kept` (N, C) 0 or 1, times `weights` (N,), averaged over all N.

    ShrinkMatch (arXiv:2308.06777): the classes that an image is confused with have no say.
    """
    return pseudo_label(logits.masked_fill(kept == 0, -torch.inf), guesses, weights)


def attenuated(scores: Tensor, losses: Tensor, penalty: float) -> Tensor:
    """Mean over N of c l - penalty log c, c = sigmoid(scores) (N,): the confidence is least where `losses` (N,) are large.

    ConMatch (arXiv:2208.08631), its learnt confidence; without bounds the best c is penalty / l.
    """
    return (torch.sigmoid(scores) * losses - penalty * F.logsigmoid(scores)).mean()


def ramp_up(progress: float, length: float) -> float:
    """exp(-5 (1 - r)^2) with r = progress / length up to 1 (Laine 2017, arXiv:1610.02242, section 3)."""
    r = min(1.0, progress / length) if length else 1.0
    return math.exp(-5 * (1 - r) ** 2)


def linear_ramp(progress: float, start: float, end: float) -> float:
    """0 up to `start`, then in a straight line to 1 at `end`, or at once where they are one (Lee 2013, equation 16)."""
    if progress >= end:
        return 1.0
    return (progress - start) / (end - start) if progress > start else 0.0
