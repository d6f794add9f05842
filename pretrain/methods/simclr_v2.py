"""SimCLR with a deeper head (Chen 2020, arXiv:2006.10029); of its three steps, the pretraining."""

from typing import ClassVar

from modicum.method import Recipe
from modicum.pretrain.methods.simclr import SimCLR


class SimCLRV2(SimCLR):
    """The same contrast as version 1; of the head's three layers fine-tuning may keep the first."""

    recipe: ClassVar = Recipe("lars", lr=6.4, batch=4096, scaling="sqrt", weight_decay=1e-4, warmup=0.05)  # 0.1 sqrt(B)
    projector_path: ClassVar = "student.1"
    defaults: ClassVar = {"temperature": 0.1, "head_layers": 3}
