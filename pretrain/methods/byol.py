"""Bootstrap your own latent (Grill 2020, arXiv:2006.07733)."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import nn

from modicum.data.stream import Batch
from modicum.method import Decisions, Facts, Loss, Method, Progress, Recipe, decide_teacher
from modicum.networks import Backbone, mlp
from modicum.optim import rising_to_one
from modicum.pretrain.losses import regression
from modicum.settings import TeacherSettings
from modicum.teacher import Teacher


class BYOL(Method):
    """A predictor on one view's embedding must hit the teacher's embedding of the other view; there are no negatives."""

    views: ClassVar = {"unlabelled": ("byol_a", "byol_b")}
    teacher_norms: ClassVar = ("bn", "sync_bn", "eman")
    recipe: ClassVar = Recipe("lars", lr=0.2, weight_decay=1.5e-6, warmup=0.01)
    collapse_causes: ClassVar = {
        "pretrain.method.teacher.momentum": "too low",
        "pretrain.batch_size": "too small for batch norm",
        "backbone.name": "without batch norm",
    }

    def __init__(
        self,
        backbone: Backbone,
        facts: Facts,
        seed: int = 0,
        *,
        hidden_size: Annotated[int, Ge(2), "width of projector and predictor"] = 4096,
        embedding_size: Annotated[int, Ge(2), "dimensions of the embeddings"] = 256,
        teacher: Annotated[TeacherSettings, "the target network; its momentum rises to 1 over the run"] = TeacherSettings(norm="bn"),
    ) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, mlp(backbone.num_features, hidden_size, embedding_size, norm=True))
        self.predictor = mlp(embedding_size, hidden_size, embedding_size, norm=True)
        self.teacher = Teacher(self.student, teacher)

    def prepare(self, batch: Batch) -> None:
        self.teacher.start(self.student, batch["unlabelled"].view(0))

    def forward(self, batch: Batch) -> Loss:
        images = batch["unlabelled"]
        predictions = [self.predictor(self.student(images.view(number))).float() for number in (0, 1)]
        targets = [self.teacher(images, view=number).float() for number in (0, 1)]  # (N, D) each, no gradient
        return Loss(regression(predictions[0], targets[1]) + regression(predictions[1], targets[0]))

    def after_step(self, progress: Progress) -> None:
        self.teacher.update(self.student, rising_to_one(self.teacher.momentum, progress.fraction))

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        return decide_teacher(settings["teacher"], facts, momentum=0.996, share=0.25)
