"""Distribution alignment: guesses are scaled so that, on average, classes occur as they should (arXiv:1911.09785, section 3.1)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from modicum import distributed
from modicum.errors import InputError
from modicum.method import Facts

MOMENTUM = 0.95  # of the running mean of guesses; the paper averages its last 128 batches
PRIOR_MOMENTUM = 0.99  # of an estimated prior, which must move more slowly than the guesses that it corrects
KnownPrior = Literal["none", "uniform", "labelled"] | list[Annotated[float, Gt(0)]]
Prior = KnownPrior | Literal["estimated"]


class RunningMean(nn.Module):
    """The exponential mean of rows (N, ...) of all ranks. It is part of the state."""

    mean: Tensor

    def __init__(self, start: Tensor, momentum: float) -> None:
        super().__init__()
        self.register_buffer("mean", start)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """Takes the rows in and returns the mean as it stands then."""
        return self.mean.lerp_(distributed.gather(rows).mean(dim=0), 1 - self.momentum)


class DistributionAlignment(RunningMean):
    """Scales probabilities (N, C) by prior / running mean of past ones, and normalises.

    `prior`: "uniform"; "labelled", as often as among the labels; the shares of the classes themselves; or "estimated", which begins
    with the labels' shares and follows the aligned guesses: sure ones, which no scaling moves, carry it to how often the classes
    occur among the unlabelled images (one step of Saerens 2002's iteration a batch, Neural Computation 14). "none" leaves all as it is.
    """

    prior: Tensor  # (C,), up to a common factor

    def __init__(self, prior: Prior, facts: Facts, momentum: float = MOMENTUM) -> None:
        super().__init__(torch.full((facts.num_classes,), 1 / facts.num_classes), momentum)
        self.kind = prior if isinstance(prior, str) else "given"
        shares = {"given": prior, "labelled": facts.class_shares, "estimated": facts.class_shares}
        self.register_buffer("prior", torch.tensor(shares.get(self.kind, [1.0] * facts.num_classes)))
        assert len(self.prior) == facts.num_classes

    @property
    def known_prior(self) -> tuple[float, ...] | None:
        """The shares (C,) that guesses are aligned to all along; None where there are none."""
        return None if self.kind in ("none", "estimated") else tuple((self.prior / self.prior.sum()).tolist())

    @torch.no_grad()
    def forward(self, probabilities: Tensor, prior: Tensor | None = None) -> Tensor:
        """`prior` (C,) takes the place of the alignment's own."""
        if self.kind == "none":
            return probabilities
        wanted = self.prior if prior is None else prior
        aligned = probabilities * (wanted / super().forward(probabilities).clamp_min(1e-6))
        aligned = aligned / aligned.sum(dim=1, keepdim=True)
        if self.kind == "estimated":
            self.prior.lerp_(distributed.gather(aligned).mean(dim=0), 1 - PRIOR_MOMENTUM)
        return aligned


def check_prior(settings: Mapping[str, Any], facts: Facts) -> None:
    """Raises InputError for given shares that do not belong to these classes."""
    given = settings.get("distribution_alignment")
    if not isinstance(given, list):
        return
    if len(given) != facts.num_classes or abs(sum(given) - 1) > 0.01:
        raise InputError(
            f"finetune.method.distribution_alignment lists {len(given)} shares that sum to {sum(given):g}; give one for each of the "
            f"{facts.num_classes} classes, in the order of their names, that sum to 1, or choose uniform, labelled or estimated."
        )
