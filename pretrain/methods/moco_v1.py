"""Momentum contrast as first published: a linear head, sharper similarities, no blur (He 2019, arXiv:1911.05722)."""

from typing import ClassVar

from modicum.method import Recipe
from modicum.pretrain.methods.moco_v2 import MoCoV2


class MoCoV1(MoCoV2):
    """The same contrast as version 2, which changed the head, the views, the temperature and the schedule."""

    views: ClassVar = {"unlabelled": ("moco_v1", "moco_v1")}
    recipe: ClassVar = Recipe("sgd", lr=0.03, weight_decay=1e-4, schedule="step")
    defaults: ClassVar = {"temperature": 0.07, "head_layers": 1}
