"""Momentum contrast with an MLP head (Chen 2020, arXiv:2003.04297; He 2019, arXiv:1911.05722)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.method import Decisions, Facts, Loss, Method, Progress, Recipe, decide_teacher
from modicum.networks import Backbone, mlp
from modicum.pretrain.losses import info_nce
from modicum.pretrain.queue import Queue
from modicum.settings import AUTO, TeacherSettings
from modicum.teacher import Teacher, in_groups

PAPER_QUEUE = 65536


class MoCoV2(Method):
    """A query must find the key of its own image among a queue of keys of others; keys come from a moving-average encoder."""

    views: ClassVar = {"unlabelled": ("moco_v2", "moco_v2")}
    target_views: ClassVar = {"unlabelled": (1,)}
    recipe: ClassVar = Recipe("sgd", lr=0.03, weight_decay=1e-4)
    collapse_causes: ClassVar = {"pretrain.method.temperature": "too high", "pretrain.method.teacher.momentum": "too low"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "divides the cosine similarities"] = 0.2,
        queue_size: Annotated[int, Ge(1), "past keys that serve as negatives"] = AUTO,
        embedding_size: Annotated[int, Ge(2), "dimensions of queries and keys"] = 128,
        head_layers: Annotated[int, Ge(1), "linear layers of the head"] = 2,
        symmetric: Annotated[bool, "each view is query and key in turn; a step costs twice as much"] = False,
        teacher: Annotated[TeacherSettings, "the key encoder"] = TeacherSettings(norm="shuffle_bn"),
    ) -> None:
        super().__init__()
        head = mlp(backbone.num_features, backbone.num_features, embedding_size, num_layers=head_layers)
        self.student = nn.Sequential(backbone, head)
        self.teacher = Teacher(self.student, teacher)
        self.queue = Queue(queue_size, embedding_size, seed)
        self.temperature = temperature
        self.pairs = ((0, 1), (1, 0)) if symmetric else ((0, 1),)  # views that are query and key

    def prepare(self, batch: Batch) -> None:
        self.teacher.start(self.student, batch["unlabelled"].view(0))

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        losses, keys = [], []
        for query, key in self.pairs:
            q = F.normalize(in_groups(self.student, images.view(query), self.teacher.groups).float(), dim=1)  # (N, D)
            k = F.normalize(self.teacher(images, view=key).float(), dim=1)  # (N, D), no gradient
            losses.append(info_nce(q, k, self.queue.keys, self.temperature))
            keys.append(k)
        self.new_keys = keys
        return Loss(torch.stack(losses).sum())

    def after_step(self, progress: Progress) -> None:
        self.teacher.update(self.student)
        self.queue.enqueue(torch.cat([distributed.gather(k) for k in self.new_keys]))  # in the order of one process

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        decisions = decide_teacher(settings["teacher"], facts, share=0.25)  # keys must not drift while they wait in the queue
        if settings["queue_size"] == AUTO:
            fitting = min(PAPER_QUEUE, 2 ** ((facts.num_images // 2).bit_length() - 1))
            why = f"the paper's {PAPER_QUEUE}, or the largest power of two in half of the {facts.num_images} images"
            decisions["queue_size"] = max(1, fitting), why
        elif settings["queue_size"] > facts.num_images:
            raise InputError(
                f"pretrain.method.queue_size = {settings['queue_size']} is larger than the data set of {facts.num_images} images, so a "
                f"query would meet older keys of its own image as negatives; use at most {facts.num_images // 2}, or auto."
            )
        return decisions
