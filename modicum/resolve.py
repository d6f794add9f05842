"""`auto` becomes a number: every setting that depends on the data or the method is decided here, once, with its reason."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modicum.config import AUTO, DataSettings, Experiment, PretrainSettings, validate
from modicum.data.images import Images
from modicum.errors import InputError
from modicum.method import Decisions, Facts, decide_momentum, find_method, settings_model
from modicum.networks.backbones import Architecture, choose_architecture, view_step
from modicum.views.policies import build_policy

MONITOR_READINGS = 20  # of the online kNN monitor over a run


@dataclass(frozen=True)
class Reason:
    """One `auto` that was decided."""

    key: str
    value: Any
    why: str


def resolve(experiment: Experiment, images: Images) -> tuple[Experiment, list[Reason]]:
    """The experiment with every `auto` decided and every method setting spelled out. Raises InputError for what cannot be."""
    settings = experiment.model_dump()
    reasons: list[Reason] = []

    def decide(prefix: str, decisions: Decisions) -> None:
        for key, (value, why) in decisions.items():
            *parents, last = f"{prefix}{key}".split(".")
            section = settings
            for parent in parents:
                section = section[parent]
            if section[last] != value:
                section[last] = value
                reasons.append(Reason(f"{prefix}{key}", value, why))

    decide("data.", _only_auto(settings["data"], _data(images)))
    architecture = choose_architecture(experiment.backbone, images.channels, images.image_size)
    for stage in ("pretrain", "finetune"):
        section = settings[stage]
        name = section["method"].get("name")
        method = find_method(stage, name)
        given = {key: value for key, value in section["method"].items() if key != "name"}
        model = validate(settings_model(method), given, source=f"{stage}.method {name}", prefix=f"{stage}.method.")
        section["method"] = {"name": name, **model.model_dump()}
        if stage == "pretrain":
            decide("pretrain.", _batch_size(experiment.pretrain, len(images.rows("train"))))
        else:
            decide("finetune.", _only_auto(section, {"ema_momentum": decide_momentum(0.999, section["steps"], share=0.1)}))
        facts = replace(stage_facts(stage, section, images), transformer=architecture.fixed_size)
        decide(f"{stage}.method.", method.decide(section["method"], facts))
        recipe = (facts.transformer and method.transformer_recipe) or method.recipe
        batch = section["batch_size"]
        optimizer: Decisions = {
            "name": (recipe.name, f"{name}'s own"),
            "lr": (round(recipe.lr * batch / recipe.batch, 6), f"{recipe.lr} for {recipe.batch} images, scaled to {batch}"),
            "weight_decay": (recipe.weight_decay, f"{name}'s own"),
            "nesterov": (recipe.nesterov, f"{name}'s own"),
        }
        decide(f"{stage}.optimizer.", _only_auto(section["optimizer"], optimizer))
        policies = [{"name": policy} for policy in method.views.get("unlabelled", method.views.get("labelled", ()))]
        rest: Decisions = {"schedule": (recipe.schedule, f"{name}'s own"), "views": (policies, f"{name}'s own")}
        if stage == "pretrain":
            epochs = section["epochs"]
            rest["warmup_epochs"] = round(recipe.warmup * epochs, 2), f"{recipe.warmup:.0%} of the run"
            rest["monitor_epochs"] = max(1, round(epochs / MONITOR_READINGS)), f"about {MONITOR_READINGS} readings over the run"
        decide(f"{stage}.", _only_auto(section, rest))
        if stage == "finetune" and len(section["views"]) > len(policies):  # weak comes first, so a method of fewer views takes the first
            decide("finetune.", {"views": (section["views"][: len(policies)], f"{name} takes {len(policies)} of those given")})
        section["views"] = _views(stage, name, section["views"], policies, method.fewest_views, DataSettings(**settings["data"]))
        _fit_views(stage, section["views"], DataSettings(**settings["data"]), architecture, experiment.backbone.name)
    return Experiment.model_validate(settings), reasons


def _views(
    stage: str, method: str, given: list[dict[str, Any]], own: list[dict[str, Any]], fewest: int | None, data: DataSettings
) -> list[dict[str, Any]]:
    """The policy of each view: those `given`, or one for all of the method's `own`, whose local crops stay as small as they are."""
    if len(given) == 1 and len(own) > 1:
        recipes = [build_policy(policy, **view_arguments(data)).recipe for policy in own]
        given = [{**given[0], "size": r.size, "crop_scale": r.crop_scale} if r.size else given[0] for r in recipes]
    if len(given) != len(own) and (fewest is None or len(given) < fewest):
        takes = f"{len(own)} views" if fewest is None else f"{fewest} views or more"
        raise InputError(f"{stage}.views names {len(given)} policies, but {method} takes {takes}.")
    return given


def _fit_views(stage: str, views: list[dict[str, Any]], data: DataSettings, architecture: Architecture, name: str) -> None:
    """Raises InputError for a policy that cannot be, or a view of a size that the network does not take."""
    sizes = {build_policy(policy, **view_arguments(data)).size for policy in views}
    if sizes == {data.image_size}:
        return
    step = view_step(architecture)
    if step is None:
        raise InputError(f"{stage}.views: {name} takes images of one size alone; set the size of every view to {data.image_size}.")
    for size in sorted(sizes):
        if size % step:
            raise InputError(
                f"{stage}.views: {name} cuts images into patches of {step} px, which do not tile a view of {size} px; "
                f"choose data.image_size and the size of small crops as multiples of {step}."
            )


def view_arguments(data: DataSettings) -> dict[str, Any]:
    """What every policy must know of resolved data settings."""
    return {key: getattr(data, key) for key in ("image_size", "channels", "mirror", "mean", "std")}


def stage_facts(stage: str, section: dict[str, Any], images: Images) -> Facts:
    """The facts that the stage's method may know, from its section of the settings."""
    num_images = len(images.rows("train"))
    return Facts(
        num_images=num_images,
        num_classes=images.num_classes,
        image_size=images.image_size,
        steps=section["steps"] if stage == "finetune" else num_steps(PretrainSettings.model_validate(section), num_images),
        batch_size=section["batch_size"],
        ema_momentum=section.get("ema_momentum", 0),
    )


def num_steps(settings: PretrainSettings, num_images: int) -> int:
    """Optimizer steps of stage one."""
    return max(1, math.ceil(settings.epochs * num_images / settings.batch_size))


def _only_auto(section: dict[str, Any], decisions: Decisions) -> Decisions:
    return {key: decision for key, decision in decisions.items() if section[key] == AUTO}


def _data(images: Images) -> Decisions:
    mean, std = pixel_statistics(images)
    return {
        "image_size": (images.image_size, "the data set's"),
        "channels": (images.channels, "the data set's"),
        "mirror": (images.mirror, "the data set's"),
        "mean": (mean, "of the training images"),
        "std": (std, "of the training images"),
    }


def pixel_statistics(images: Images, most: int = 10_000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel of (at most `most`, evenly spaced) training images, pixels in 0..1."""
    rows = images.rows("train")
    pixels = images.pixels[rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]].float() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
    return [round(float(value), 4) for value in mean], [round(max(float(value), 1e-2), 4) for value in std]


def _batch_size(settings: PretrainSettings, num_images: int) -> Decisions:
    if settings.batch_size <= num_images:
        return {}
    if "batch_size" in settings.model_fields_set:
        raise InputError(f"pretrain.batch_size = {settings.batch_size} is larger than the {num_images} training images.")
    return {"batch_size": (max(2, num_images // 2), f"half of the {num_images} training images")}
