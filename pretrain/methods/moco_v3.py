"""Momentum contrast without a queue, for vision transformers too (Chen 2021, arXiv:2104.02057)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from annotated_types import Ge, Gt
from timm.layers import PatchEmbed
from torch import Tensor, nn

from modicum import distributed
from modicum.data.stream import Batch
from modicum.errors import InputError
from modicum.method import Decisions, Facts, Loss, Method, Progress, Recipe, decide_teacher
from modicum.networks import Backbone, mlp
from modicum.networks.norms import GroupedBatchNorm, replace_norms
from modicum.optim import rising_to_one
from modicum.pretrain.losses import in_batch_info_nce
from modicum.settings import AUTO, TeacherSettings
from modicum.teacher import Teacher, in_groups


class MoCoV3(Method):
    """The predicted query of each view must find the other view's key among the keys of the batch, of all ranks."""

    views: ClassVar = {"unlabelled": ("byol_a", "byol_b")}
    recipe: ClassVar = Recipe("lars", lr=0.3, weight_decay=1.5e-6, warmup=0.03)
    transformer_recipe: ClassVar = Recipe("adamw", lr=1.5e-4, weight_decay=0.1, warmup=0.13)
    collapse_causes: ClassVar = {"pretrain.method.temperature": "too high", "pretrain.batch_size": "too small"}

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        temperature: Annotated[float, Gt(0), "divides the cosine similarities"] = AUTO,
        hidden_size: Annotated[int, Ge(2), "width of projector and predictor"] = 4096,
        embedding_size: Annotated[int, Ge(2), "dimensions of queries and keys"] = 256,
        head_layers: Annotated[int, Ge(1), "linear layers of the projector"] = AUTO,
        frozen_patches: Annotated[bool, "a transformer's patch projection stays as drawn, which steadies its training"] = AUTO,
        teacher: Annotated[TeacherSettings, "the key encoder; its momentum rises to 1 over the run"] = TeacherSettings(norm="bn"),
    ) -> None:
        super().__init__()
        if frozen_patches:
            for module in backbone.modules():
                if isinstance(module, PatchEmbed):
                    module.proj.requires_grad_(False)
        projector = mlp(backbone.num_features, hidden_size, embedding_size, num_layers=head_layers, norm=True)
        self.student = nn.Sequential(backbone, projector, nn.BatchNorm1d(embedding_size, affine=False))
        self.predictor = nn.Sequential(
            mlp(embedding_size, hidden_size, embedding_size, norm=True), nn.BatchNorm1d(embedding_size, affine=False)
        )
        self.teacher = Teacher(self.student, teacher)
        if teacher.norm == "shuffle_bn":  # queries are normalised in groups from end to end
            replace_norms(self.predictor, GroupedBatchNorm)
        self.temperature = temperature

    def prepare(self, batch: Batch) -> None:
        self.teacher.start(self.student, batch["unlabelled"].view(0))

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        q = [self._query(images.view(number)) for number in (0, 1)]  # (N, D) each
        k = [distributed.gather(F.normalize(self.teacher(images, view=number).float(), dim=1)) for number in (0, 1)]  # no gradient
        offset = distributed.rank() * len(q[0])
        return Loss(in_batch_info_nce(q[0], k[1], offset, self.temperature) + in_batch_info_nce(q[1], k[0], offset, self.temperature))

    def _query(self, images: Tensor) -> Tensor:
        predicted = in_groups(nn.Sequential(self.student, self.predictor), images, self.teacher.groups)
        return F.normalize(predicted.float(), dim=1)

    def after_step(self, progress: Progress) -> None:
        self.teacher.update(self.student, rising_to_one(self.teacher.momentum, progress.fraction))

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        if settings["frozen_patches"] is True and not facts.transformer:
            raise InputError(
                "pretrain.method.frozen_patches = true would do nothing, since the backbone is no transformer and projects no patches: "
                "leave it out, or choose a backbone such as vit_small_patch16_224."
            )
        decisions = decide_teacher(settings["teacher"], facts, momentum=0.99, share=0.25)
        kind = "transformers" if facts.transformer else "convolutional networks"
        papers: Decisions = {"temperature": (0.2 if facts.transformer else 1.0, f"the paper's for {kind}")}
        papers["head_layers"] = 3 if facts.transformer else 2, f"the paper's for {kind}"
        papers["frozen_patches"] = facts.transformer, f"the paper's for {kind}"
        return decisions | {key: decision for key, decision in papers.items() if settings[key] == AUTO}
