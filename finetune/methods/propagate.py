"""Label propagation (Zhou 2004, NIPS, "local and global consistency") and Poisson learning (Calder 2020, arXiv:2006.11184)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt, Lt

from modicum.errors import InputError
from modicum.finetune.alignment import DistributionAlignment, KnownPrior
from modicum.finetune.propagation import Kind, Propagation
from modicum.finetune.semi_supervised import SemiSupervised
from modicum.method import Decisions, Facts
from modicum.networks import Backbone


class Propagate(SemiSupervised):
    """Labels spread over the neighbours of the frozen backbone's features, and a linear head learns them, for images yet to come.

    That head is the whole method: it has no views, so that no step follows.
    """

    views: ClassVar = {}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        kind: Annotated[Kind, "zhou: influence that fades with the way; poisson: labels as sources and sinks"] = Propagation.kind,
        neighbours: Annotated[int, Ge(1), "nearest images that each image is joined to"] = Propagation.neighbours,
        alpha: Annotated[float, Gt(0), Lt(1), "of zhou: share that goes on at each image, 1 for the whole graph"] = Propagation.alpha,
        distribution_alignment: Annotated[
            KnownPrior, "of zhou: how often each class is to be named: none, uniform, labelled, or shares"
        ] = "none",
    ) -> None:
        super().__init__(backbone, facts)
        self.align = DistributionAlignment(distribution_alignment, facts)
        self.how = Propagation(kind, neighbours, alpha, self.class_prior)

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        if settings["neighbours"] >= facts.num_images:
            raise InputError(
                f"finetune.method.neighbours = {settings['neighbours']}, but an image has only {facts.num_images - 1} others; choose fewer."
            )
        if settings["kind"] == "poisson" and settings["distribution_alignment"] != "none":
            raise InputError("finetune.method.distribution_alignment scales the shares of kind = zhou; poisson names classes and has none.")
        return super().decide(settings, facts)
