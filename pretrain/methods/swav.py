"""Swapping assignments between views (Caron 2020, arXiv:2006.09882)."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.method import Decisions, Facts, Loss, Method, Progress, Recipe
from modicum.networks import Backbone, mlp
from modicum.networks.stems import SMALL_IMAGE
from modicum.optim import Pace
from modicum.pretrain.crops import by_size
from modicum.pretrain.losses import across_views, sinkhorn
from modicum.pretrain.prototypes import Prototypes
from modicum.pretrain.queue import Queue
from modicum.settings import AUTO

PAPER_PROTOTYPES = 3000


class SwAV(Method):
    """Every view must predict to which prototypes the two large crops were assigned, all prototypes being used alike."""

    views: ClassVar = {"unlabelled": ("swav", "swav", *("swav_local",) * 6)}
    fewest_views: ClassVar = 2
    recipe: ClassVar = Recipe("lars", lr=0.3, weight_decay=1e-6, warmup=0.0125)
    collapse_causes: ClassVar = {"pretrain.method.epsilon": "too high", "pretrain.method.frozen_epochs": "too few"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "divides the cosines to the prototypes"] = 0.1,
        epsilon: Annotated[float, Gt(0), "smoothness of the assignments"] = AUTO,
        sinkhorn_rounds: Annotated[int, Ge(1), "rounds of equalising prototypes and images"] = 3,
        num_prototypes: Annotated[int, Ge(2), "prototypes"] = AUTO,
        frozen_epochs: Annotated[float, Ge(0), "first epochs in which the prototypes stand still"] = 1.0,
        hidden_size: Annotated[int, Ge(2), "width of the projector"] = 2048,
        embedding_size: Annotated[int, Ge(2), "dimensions of embeddings and prototypes"] = 128,
        queue_size: Annotated[int, Ge(0), "past embeddings of each large crop that are assigned together with the batch's; 0: none"] = 0,
        queue_epochs: Annotated[float, Ge(0), "first epochs without the queue"] = AUTO,
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, mlp(backbone.num_features, hidden_size, embedding_size, norm=True))
        self.prototypes = Prototypes(embedding_size, num_prototypes)
        self.paces = {"prototypes": Pace(starts=facts.share_of_run(frozen_epochs))}
        self.queues = nn.ModuleList(Queue(queue_size, embedding_size, seed) for _ in range(2 if queue_size else 0))
        self.queue_starts = _queue_starts(queue_size, queue_epochs, facts) if queue_size else 0
        self.temperature, self.epsilon, self.rounds = temperature, epsilon, sinkhorn_rounds

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        z = by_size(self.student, [images.view(number) for number in range(images.num_views)])
        scores = [self.prototypes(embeddings) for embeddings in z]  # (N, K) each
        codes = [self._codes(scores[view], view) for view in (0, 1)]
        self.new_embeddings = [F.normalize(embeddings.detach().float(), dim=1) for embeddings in z[:2]]
        return Loss(across_views([view / self.temperature for view in scores], codes))

    @torch.no_grad()
    def _codes(self, scores: Tensor, view: int) -> Tensor:
        """This rank's rows (N, K) of an assignment of all ranks' images, and of the queue's."""
        everyone = distributed.gather(scores)
        mine = distributed.share(len(everyone))
        if self.queues and self.progress.step >= self.queue_starts:
            everyone = torch.cat([everyone, self.prototypes(self.queues[view].keys)])
        return sinkhorn(everyone, self.epsilon, self.rounds)[mine]

    def after_step(self, progress: Progress) -> None:
        for view, queue in enumerate(self.queues):
            assert isinstance(queue, Queue)
            queue.enqueue(distributed.gather(self.new_embeddings[view]))

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions = _decide_queue(settings["queue_size"], settings["queue_epochs"], facts)
        if settings["epsilon"] == AUTO:
            # embeddings of small images begin close together: 0.05 assigns all of them evenly, which teaches nothing
            small = facts.image_size <= SMALL_IMAGE
            why = f"for images of up to {SMALL_IMAGE} px, whose embeddings begin close together" if small else "the paper's"
            decisions["epsilon"] = 0.02 if small else 0.05, why
        if settings["num_prototypes"] == AUTO:
            together = facts.batch_size + settings["queue_size"]
            why = f"the paper's {PAPER_PROTOTYPES}, or one for each of the {together} images assigned together"
            decisions["num_prototypes"] = min(PAPER_PROTOTYPES, together), why
        return decisions


def _queue_starts(size: int, epochs: float, facts: Facts) -> int:
    """The step from which the queue is used: `epochs` are over, and it holds embeddings and nothing else."""
    return max(math.ceil(size / facts.batch_size), round(epochs * facts.num_images / facts.batch_size))


def _decide_queue(size: int, epochs: Any, facts: Facts) -> Decisions:
    """The first epochs without the queue, where they are left `auto`. Raises InputError for a queue, or epochs, that would do nothing."""
    if not size:
        if epochs != AUTO:
            raise InputError(f"pretrain.method.queue_epochs = {epochs:g} would do nothing without a queue: give queue_size, or omit it.")
        return {}
    if size > facts.num_images:
        raise InputError(
            f"pretrain.method.queue_size = {size} is larger than the data set of {facts.num_images} images, so it "
            f"would hold images twice; use at most {facts.num_images // 2}, or 0."
        )
    quarter = round(facts.steps * facts.batch_size / facts.num_images / 4, 2)
    ours = min((15.0, "the paper's"), (quarter, "a quarter of the run, less than the paper's 15"))
    starts = _queue_starts(size, ours[0] if epochs == AUTO else epochs, facts)
    if starts >= facts.steps:
        raise InputError(
            f"pretrain.method.queue_size = {size} would do nothing: full, and after its queue_epochs, it would serve from step "
            f"{starts} on, and the run has {facts.steps}. Choose a smaller queue, fewer queue_epochs, or more epochs."
        )
    return {"queue_epochs": ours} if epochs == AUTO else {}
