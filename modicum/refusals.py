"""Settings that cannot be, or would do nothing, and are refused before any work; and one that is only warned of."""

from typing import Any

from modicum.errors import InputError
from modicum.method import Method, find_method
from modicum.networks.backbones import Architecture, names_layers
from modicum.record import warn
from modicum.settings import FinetuneSettings


def refuse_norm(stage: str, method: type[Method], settings: dict[str, Any]) -> None:
    """Raises InputError for a teacher's norm that the method does not take."""
    teacher = settings.get("teacher", "none")
    if teacher != "none" and teacher["norm"] not in method.teacher_norms:
        *most, last = method.teacher_norms
        raise InputError(
            f"{stage}.method.teacher.norm = {teacher['norm']} has no use in {settings['name']}, which contrasts no query with "
            f"other keys: choose {', '.join(most)} or {last}."
        )


def refuse_projector(pretrain: dict[str, Any], settings: FinetuneSettings) -> None:
    """Raises InputError where stage one leaves no layer of a projector to keep."""
    if settings.projector_layers and settings.init == "pretrain":
        if find_method("pretrain", pretrain["name"]).projector_path is None:
            raise InputError(
                f"finetune.projector_layers = 1 keeps a layer of simclr_v2's projector; pretrain.method is {pretrain['name']}: choose 0."
            )
        if pretrain["head_layers"] == 1:
            raise InputError(
                "finetune.projector_layers = 1 needs pretrain.method.head_layers = 2 or more: a single layer is all left behind."
            )


def refuse_idle_rates(settings: FinetuneSettings, architecture: Architecture) -> None:
    """Raises InputError for a learning rate of the backbone that nothing would have, or that its layers cannot have."""
    if settings.frozen:
        if settings.init == "random":
            raise InputError("finetune.freeze_backbone leaves finetune.init = random as it was drawn; start from a pretrained backbone.")
        for key, idle in (("layer_decay", settings.layer_decay != 1), ("backbone_lr_scale", settings.backbone_lr_scale not in (0, 1))):
            if idle:
                raise InputError(f"finetune.{key} = {getattr(settings, key)} would do nothing, since the backbone is frozen: set it to 1.")
    if settings.layer_decay != 1 and not names_layers(architecture):
        raise InputError(f"finetune.layer_decay: timm does not say what the layers of {architecture.name} are; leave it at 1.")


def refuse_long_warmup(stage: str, section: dict[str, Any]) -> None:
    """Raises InputError for a warm-up that outlasts the run."""
    unit = "epochs" if stage == "pretrain" else "steps"
    warmup, whole = section[f"warmup_{unit}"], section[unit]
    if warmup > whole:
        raise InputError(f"{stage}.warmup_{unit} = {warmup:g} is longer than the run of {whole:g} {unit}: choose {whole:g} or less.")


def warn_of_leak(stage: str, section: dict[str, Any]) -> None:
    """Statistics over all ranks tell a query from its queue as well as those of one (He 2019, arXiv:1911.05722, section 3.3)."""
    method = section["method"]
    if "queue_size" not in method or "teacher" not in method:
        return
    teacher = method["teacher"]["norm"]
    if teacher == "sync_bn" or (section["norm"] == "sync_bn" and teacher == "bn"):
        warn(
            f"{stage}: sync_bn does not keep a query and its key from sharing norm statistics that no key in the queue has, so the "
            "task can be solved without seeing the images. teacher.norm shuffle_bn or eman prevents that."
        )
