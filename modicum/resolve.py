"""`auto` becomes a number: every setting that depends on the data or the method is decided here, once, with its reason."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modicum import distributed
from modicum.data.images import UNKNOWN, Images
from modicum.data.splits import num_labels
from modicum.errors import InputError
from modicum.exchange import initial_backbone, refuse_unfit_teacher
from modicum.method import Decisions, Facts, Method, decide_momentum, find_method, spelled_out
from modicum.networks.backbones import Architecture, choose_architecture, takes, view_step
from modicum.optim import decide_optimizer
from modicum.record import warn
from modicum.refusals import refuse_idle_rates, refuse_long_warmup, refuse_norm, refuse_projector, warn_of_leak
from modicum.settings import AUTO, DataSettings, Experiment, FinetuneSettings, PretrainSettings
from modicum.small_data import BATCH, OPTIMIZER, USUAL_BATCH, WHY, WHY_USUAL, is_small, milder, takes_ours
from modicum.views.policies import build_policy

MONITOR_READINGS = 20  # of the online kNN monitor over a run
LABELLED, MU, WHOSE = 64, 7, "FixMatch's own"  # images of a step in stage two
MOST_PROPAGATED = 200_000  # images among which labels are propagated unasked
# Labels a class below which propagated labels end better alone than beside the trained head, and from which that stays as it is: the
# first by docs/results.md, the second since nothing was measured with more.
FEW_A_CLASS, MANY_A_CLASS = 100, 200


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

    decide("data.", _only_auto(settings["data"], _data(images, experiment.data)))
    architecture = choose_architecture(experiment.backbone, images.channels, images.image_size)
    for stage in ("pretrain", "finetune"):
        section = settings[stage]
        name = section["method"].get("name")
        method = find_method(stage, name)
        section["method"] = spelled_out(stage, section["method"])
        refuse_norm(stage, method, section["method"])
        num_images = len(images.rows("train"))
        if stage == "pretrain":
            decide("pretrain.", _only_auto(section, _batch_size(experiment.pretrain, num_images)))
        else:
            refuse_projector(settings["pretrain"]["method"], experiment.finetune)
            decide("finetune.", _only_auto(section, _images_a_step(experiment.finetune, method, images)))
            start = {
                "ema_momentum": decide_momentum(0.999, section["steps"], share=0.1),
                "export": _export(section["method"]),
                **_propagation(experiment.finetune, method, images),
            }
            decide("finetune.", _only_auto(section, start))
            refuse_idle_rates(experiment.finetune, architecture)
        batch, ranks = section["batch_size"], distributed.announced_ranks()
        if batch % ranks:
            raise InputError(f"{stage}.batch_size = {batch} cannot be dealt evenly to {ranks} ranks: choose a multiple of {ranks}.")
        if batch == ranks and section["norm"] == "bn":
            raise InputError(f"{stage}.batch_size = {batch} leaves each of {ranks} ranks one image, which has no variance: choose more.")
        facts = replace(stage_facts(stage, section, images), transformer=architecture.fixed_size)
        decide(f"{stage}.method.", method.decide(section["method"], facts))
        section["method"] = spelled_out(stage, section["method"])  # what was decided keeps the bounds too
        warn_of_leak(stage, section)
        recipe, whose = (facts.transformer and method.transformer_recipe) or method.recipe, f"{name}'s own"
        data = DataSettings(**settings["data"])
        views = method.views.get("unlabelled") or method.views.get("labelled") or ("weak",)  # that of the baselines, for want of steps
        policies: list[dict[str, Any]] = [{"name": policy} for policy in views]
        rest: Decisions = {"schedule": (recipe.schedule, whose)}
        if stage == "pretrain" and is_small(facts.num_images):
            policies = [milder(policy, build_policy(policy, **view_arguments(data)).recipe) for policy in policies]
            if not facts.transformer and takes_ours(section["optimizer"]):
                recipe, whose = replace(OPTIMIZER, schedule=recipe.schedule), WHY
        chosen = decide_optimizer(section["optimizer"], recipe, whose, batch, f"{stage}.optimizer")
        decide(f"{stage}.optimizer.", _only_auto(section["optimizer"], chosen))
        rest["views"] = policies, f"{name}'s own" + (", milder" if any(len(policy) > 1 for policy in policies) else "")
        if stage == "pretrain":
            epochs = section["epochs"]
            rest["warmup_epochs"] = round(recipe.warmup * epochs, 2), f"{recipe.warmup:.0%} of the run, {whose}"
            rest["monitor_epochs"] = max(1, round(epochs / MONITOR_READINGS)), f"about {MONITOR_READINGS} readings over the run"
        decide(f"{stage}.", _only_auto(section, rest))
        refuse_long_warmup(stage, section)
        if section["method"].get("teacher_from") is not None:
            refuse_unfit_teacher(f"{stage}.method.teacher_from", section["method"]["teacher_from"], data, images.class_names)
        decide(f"{stage}.", _views(stage, section, "views", policies, name, data, method.fewest_views))
        if stage == "finetune":
            own = [{"name": policy} for policy in method.views.get("labelled", ("weak",))]  # the baselines take one
            same = (section["views"] * len(own))[: len(own)], "as the unlabelled ones, weak first"
            decide("finetune.", _only_auto(section, {"labelled_views": same}))
            decide("finetune.", _views(stage, section, "labelled_views", own, name, data))
        used = [*section["views"], *section.get("labelled_views", ())]
        _fit_views(stage, used, data, architecture, experiment.backbone.name, name if method.one_size else None)
    resolved = Experiment.model_validate(settings)
    for init, projector_layers in ((resolved.pretrain.init, 0), (resolved.finetune.init, resolved.finetune.projector_layers)):
        if init not in (None, "pretrain", "random"):
            initial_backbone(init, resolved, projector_layers)  # one that does not fit is refused before anything is made
    return resolved, reasons


def _views(
    stage: str, section: dict[str, Any], key: str, own: list[dict[str, Any]], name: str, data: DataSettings, fewest: int | None = None
) -> Decisions:
    """As many policies as the method's `own`. Raises InputError where it cannot be.

    One given serves all, and local crops stay as small as they are; some methods take any number from `fewest` on.
    """
    given = section[key]
    if len(given) == 1:
        recipes = [build_policy(policy, **view_arguments(data)).recipe for policy in own]
        sized = [{**given[0], "size": r.size, "crop_scale": r.crop_scale} if r.size else given[0] for r in recipes]
        return {key: (sized, "the same for all")}
    if stage == "finetune" and len(given) > len(own):  # weak comes first, so that methods of fewer views can be compared in one sweep
        chosen = given[-len(own) :] if own[0]["name"] == "strong" else given[: len(own)]
        return {key: (chosen, f"{name} takes {len(own)} of those given")}
    strong = {policy["name"] for policy in own[len(given) - 1 :]}
    if stage == "finetune" and 1 < len(given) < len(own) and len(strong) == 1:  # likewise those of more strong views
        return {key: (given + given[-1:] * (len(own) - len(given)), f"{name} takes {len(own)}, the last for the rest")}
    if len(given) != len(own) and (fewest is None or len(given) < fewest):
        takes = f"{len(own)} views" if fewest is None else f"{fewest} views or more"
        raise InputError(f"{stage}.{key} names {len(given)} policies, but {name} takes {takes}.")
    return {}


def _fit_views(
    stage: str, views: list[dict[str, Any]], data: DataSettings, architecture: Architecture, name: str, together: str | None
) -> None:
    """Raises InputError for a policy that cannot be, or a view of a size that the network does not take.

    `together` is the method, where it passes all views at once.
    """
    sizes = {build_policy(policy, **view_arguments(data)).size for policy in views}
    if sizes == {data.image_size}:
        return
    if together and len(sizes) > 1:
        raise InputError(
            f"{stage}.views have sides of {' and '.join(map(str, sorted(sizes)))} px, but {together} passes all views through the network "
            "together: give them one size."
        )
    step = view_step(architecture)
    if step is None:
        raise InputError(f"{stage}.views: {name} takes images of one size alone; set the size of every view to {data.image_size}.")
    for size in sorted(sizes):
        if size % step:
            raise InputError(
                f"{stage}.views: {name} cuts images into patches of {step} px, which do not tile a view of {size} px; "
                f"choose data.image_size and the size of small crops as multiples of {step}."
            )
        if not takes(architecture, size):
            raise InputError(f"{stage}.views: {name} makes no features of views of {size} px; choose larger ones, or another backbone.")


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
        norm=section["norm"],
        ema_momentum=section.get("ema_momentum", 0),
    )


def num_steps(settings: PretrainSettings, num_images: int) -> int:
    """Optimizer steps of stage one."""
    return max(1, math.ceil(settings.epochs * num_images / int(settings.batch_size)))


def _only_auto(section: dict[str, Any], decisions: Decisions) -> Decisions:
    return {key: decision for key, decision in decisions.items() if section[key] == AUTO}


def _export(method: dict[str, Any]) -> tuple[str, str]:
    teacher = method.get("teacher", "none")
    if teacher != "none" and teacher["norm"] == "eman":
        return "eman", "the teacher's averaged weights and norm statistics"
    return "ema", "averaged weights"


def _propagation(settings: FinetuneSettings, method: type[Method], images: Images) -> Decisions:
    """Whether labels are propagated over the backbone's features before the first step, and after the last over those that it made."""
    known = images.labels[images.rows("train")] != UNKNOWN
    given, why_not = num_labels(settings.labels, int(known.sum())), None
    if "unlabelled" not in method.views:
        why_not = f"{settings.method['name']} learns from labels alone" if method.views else "it is what the method does"
    elif given in (0, len(known)):
        why_not = "no image is without a label" if given else "no image has a label"
    elif len(known) > MOST_PROPAGATED:
        why_not = f"the search for neighbours among {len(known):,} images would take long"
    if why_not:
        return {"warm_start": ("none", why_not), "finish": ("none", why_not)}
    start = "propagate", "where labels are few, the start decides"
    end = "propagate", "with few labels neighbours know more than the head"
    if settings.init == "random":
        start = "none", "random weights know no neighbours"
    if settings.frozen:
        end = "none", "the backbone stays as it is"
    elif given >= MANY_A_CLASS * images.num_classes:
        end = "none", f"from {MANY_A_CLASS} labels a class up neighbours are not known to add to the head"
    elif given >= FEW_A_CLASS * images.num_classes:
        end = "average", f"from {FEW_A_CLASS} labels a class up the head knows as much as neighbours"
    return {"warm_start": start, "finish": end}


def _data(images: Images, settings: DataSettings) -> Decisions:
    for key in ("mean", "std"):
        given = getattr(settings, key)
        if given != AUTO and len(given) != images.channels:
            raise InputError(f"data.{key} = {given} is not one number a channel, of which the images have {images.channels}.")
    mean, std = pixel_statistics(images) if AUTO in (settings.mean, settings.std) else (settings.mean, settings.std)
    return {
        "image_size": (images.image_size, "the data set's"),
        "channels": (images.channels, "the data set's"),
        "mirror": (images.mirror, "the data set's"),
        "mean": (mean, "of the training images"),
        "std": (std, "of the training images"),
    }


def pixel_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel of evenly spaced training images, at most 10,000 and 256 MiB, pixels in 0..1."""
    rows = images.rows("train")
    most = min(10_000, (1 << 28) // images.pixels.shape[1:].numel())
    pixels = images.pixels[rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int)]].float() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))
    return [round(float(value), 4) for value in mean], [round(max(float(value), 1e-2), 4) for value in std]


def _batch_size(settings: PretrainSettings, num_images: int) -> Decisions:
    if num_images < 2:
        raise InputError("There is one training image, and nothing to compare it with: set data.root to a folder of more.")
    if isinstance(settings.batch_size, int) and settings.batch_size > num_images:
        raise InputError(f"pretrain.batch_size = {settings.batch_size} is larger than the {num_images} training images.")
    usual, why = (BATCH, WHY) if is_small(num_images) else (USUAL_BATCH, WHY_USUAL)
    if usual <= num_images:
        return {"batch_size": (usual, why)}
    ranks = distributed.announced_ranks()
    half = num_images // 2 // (2 * ranks) * 2 * ranks  # even on each rank, so that it can be shuffled in groups
    return {"batch_size": (max(min(4, num_images), half), f"half of the {num_images} training images")}


def _images_a_step(settings: FinetuneSettings, method: type[Method], images: Images) -> Decisions:
    """Stage two's batch sizes, for those left `auto`; labelled images may come twice a step, unlabelled ones not."""
    num_images, what = len(images.rows("train")), "training images"
    if not settings.labelled_in_unlabelled:
        known = int((images.labels[images.rows("train")] != UNKNOWN).sum())
        num_images, what = num_images - min(known, num_labels(settings.labels, known)), "unlabelled images"
        if not num_images:
            raise InputError(
                "finetune.labelled_in_unlabelled = false leaves no unlabelled image, since all training images give their label: leave it "
                "out, or ask for fewer labels."
            )
    given = {key: value for key in ("batch_size", "mu") if (value := getattr(settings, key)) != AUTO}
    batch, mu = given.get("batch_size", LABELLED), given.get("mu", MU)
    usual = {"batch_size": (batch, WHOSE), "mu": (mu, WHOSE)}
    if not method.views:  # it takes no step
        return usual
    if "unlabelled" not in method.views and "mu" in given:
        warn(f"finetune.mu = {settings.mu} does nothing: {settings.method['name']} sees no unlabelled image.")
    seen = mu if "unlabelled" in method.views else 1
    if seen * batch <= num_images:
        return usual
    if given:
        times = f" with mu = {mu}, {seen * batch} unlabelled images a step," if seen > 1 else ""
        raise InputError(f"finetune.batch_size = {batch}{times} is more than the {num_images} {what}: choose fewer, or leave both out.")
    ranks = distributed.announced_ranks()
    fitting = min(batch, max(2, num_images // seen // ranks * ranks))
    why = f"of the {num_images} {what}, none twice a step"
    return {"batch_size": (fitting, why), "mu": (max(1, min(mu, num_images // fitting)), why)}
