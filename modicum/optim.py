"""Optimizers over parameter groups, and learning-rate schedules as pure functions of progress."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.optim import Lars, param_groups_layer_decay
from torch import nn

from modicum.errors import InputError
from modicum.settings import AUTO, OptimizerSettings

Schedule = Callable[[float], float]  # progress in 0..1 -> share of the peak learning rate

HAVE_MOMENTUM = {"sgd", "lars"}  # AdamW's averages go by other names

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_7_16": lambda progress: math.cos(7 * math.pi * progress / 16),  # FixMatch (arXiv:2001.07685), section 2.3
    "step": lambda progress: 0.1 ** sum(progress >= milestone for milestone in (0.6, 0.8)),  # MoCo (arXiv:1911.05722)
}


@dataclass(frozen=True)
class Recipe:
    """A paper's optimizer; `lr` is stated for `batch` images a step and scaled to others."""

    name: str
    lr: float
    weight_decay: float
    batch: int = 256
    scaling: str = "linear"  # linear | sqrt
    sqrt_lr: float | None = None  # for `batch` images, where the paper has another one to be scaled by the square root
    nesterov: bool = False
    schedule: str = "cosine"
    warmup: float = 0.0  # share of the run


def decide_optimizer(settings: Mapping[str, Any], recipe: Recipe, whose: str, batch: int, prefix: str) -> dict[str, tuple[Any, str]]:
    """What a section's settings are where they are left `auto`, each with its reason, for `batch` images a step.

    `whose` says where the recipe comes from: "byol's own". Raises InputError for an explicit setting that the optimizer would ignore,
    and for another optimizer without a rate of its own.
    """
    chosen = recipe.name if settings["name"] == AUTO else settings["name"]
    momentum = (0.9 if chosen in HAVE_MOMENTUM else 0.0) if settings["momentum"] == AUTO else settings["momentum"]
    given = settings["lr"] != AUTO
    scaling = ("none" if given else recipe.scaling) if settings["scaling"] == AUTO else settings["scaling"]
    lr = _learning_rate(recipe, scaling, batch)
    if given and scaling != "none" and settings["lr"] != lr[0]:  # equal it is in the settings of a run that has resolved them
        raise InputError(f"{prefix}.scaling = {scaling} would do nothing, since lr = {settings['lr']:g} is given: leave out one of them.")
    accelerates = chosen == "sgd" and momentum > 0  # Nesterov's momentum is SGD's, and one of 0 is none
    for key, heeded in (("momentum", chosen in HAVE_MOMENTUM), ("nesterov", accelerates)):
        if settings[key] not in (AUTO, 0) and not heeded:
            without = f"{chosen} with momentum 0" if key == "nesterov" and chosen == "sgd" else chosen
            raise InputError(f"{prefix}.{key} = {settings[key]} would do nothing, since {without} has none: leave it out.")
    if chosen != recipe.name and not given:
        raise InputError(f"{prefix}.name = {chosen} needs a learning rate: {whose} is one for {recipe.name}. Give {prefix}.lr.")
    return {
        "name": (recipe.name, whose),
        "lr": lr,
        "scaling": (scaling, "lr is given" if given else whose),
        "weight_decay": (recipe.weight_decay, whose),
        "momentum": (momentum, "the usual" if momentum else f"{chosen} has none"),
        "nesterov": (recipe.nesterov and accelerates, whose if accelerates else f"{chosen} has none"),
    }


def _learning_rate(recipe: Recipe, scaling: str, batch: int) -> tuple[float, str]:
    """The recipe's rate for `batch` images a step, and by which formula (linear: arXiv:1706.02677; sqrt: arXiv:1404.5997)."""
    lr = recipe.sqrt_lr or recipe.lr if scaling == "sqrt" else recipe.lr
    ratio = batch / recipe.batch
    factor, formula = {
        "linear": (ratio, f"linear scaling: {lr:g} * {batch} / {recipe.batch}"),
        "sqrt": (math.sqrt(ratio), f"square-root scaling: {lr:g} * sqrt({batch} / {recipe.batch})"),
        "none": (1.0, f"that for {recipe.batch} images, unscaled"),
    }[scaling]
    return round(lr * factor, 6), formula


def schedule_with_warmup(name: str, warmup: float) -> Schedule:
    """The named schedule after a linear rise over the first `warmup` (0..1) of the run."""
    after = SCHEDULES[name]

    def schedule(progress: float) -> float:
        return progress / warmup if progress < warmup else after((progress - warmup) / (1 - warmup))

    return schedule


@dataclass(frozen=True)
class Pace:
    """How a part of a method follows the learning rate of the run."""

    scheduled: bool = True  # False: always at the peak
    starts: float = 0.0  # share of the run before which the part stands still


def parameter_groups(
    modules: Iterable[tuple[nn.Module, float]], weight_decay: float, paces: Mapping[nn.Module, Pace] | None = None
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of `modules`, each module with the factor of its learning rate; `paces` of parts of them.

    Biases and norm layers (parameters of at most one dimension) are neither decayed nor scaled by LARS.
    """
    own = {parameter: pace for part, pace in (paces or {}).items() for parameter in part.parameters()}
    groups: list[dict[str, Any]] = []
    for module, scale in modules:
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for pace in dict.fromkeys((Pace(), *own.values())):
            at_pace = [parameter for parameter in trainable if own.get(parameter, Pace()) == pace]
            for decay, chosen in ((weight_decay, [p for p in at_pace if p.ndim > 1]), (0.0, [p for p in at_pace if p.ndim <= 1])):
                if chosen and scale:
                    groups.append({"params": chosen, "weight_decay": decay, "scale": scale, **asdict(pace)})
    return groups


def groups_by_layer(network: nn.Module, scale: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """The same for a network of timm's, whose last layer has the factor `scale`, and each below it `layer_decay` times the next one's.

    What a layer is, timm says: a block of a residual network or of a transformer, the stem (arXiv:2106.08254, section 3.2).
    """
    groups = param_groups_layer_decay(network, weight_decay, layer_decay=layer_decay)
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "scale": scale * group["lr_scale"], **asdict(Pace())}
        for group in groups
    ]


def learning_rate(group: Mapping[str, Any], peak: float, schedule: Schedule, progress: float) -> float:
    """Of one of the groups above, `progress` (0..1) into the run."""
    if progress < group["starts"]:
        return 0.0
    return peak * group["scale"] * (schedule(progress) if group["scheduled"] else 1.0)


def rising_to_one(momentum: float, progress: float) -> float:
    """A teacher's momentum that starts at `momentum` and rises by a cosine to 1 at the end (arXiv:2006.07733, section 3.2)."""
    return 1 - (1 - momentum) * SCHEDULES["cosine"](progress)


def build_optimizer(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of resolved settings. LARS (arXiv:1708.03888) adapts weights, not biases and norm layers."""
    lr, momentum = float(settings.lr), float(settings.momentum)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)  # one pass over memory instead of a dozen calls a parameter
    if settings.name == "lars":
        return Lars([group | {"always_adapt": group["params"][0].ndim > 1} for group in groups], lr=lr, momentum=momentum)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=settings.nesterov is True)
