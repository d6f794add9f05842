"""Stage two from a session: fine-tune the classifier, the supervised baselines that it is compared with, the refits that judge it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modicum import distributed
from modicum.checkpoint import Preprocessing, load_classifier, save_backbone, save_classifier
from modicum.data.stream import Stream
from modicum.exchange import initial_backbone
from modicum.features import outputs
from modicum.finetune.audit import Audit, calibration_error, class_shares
from modicum.finetune.methods.noisy_student import NoisyStudent
from modicum.finetune.methods.propagate import Propagate
from modicum.finetune.propagated_head import propagated_head
from modicum.finetune.propagation import Propagation
from modicum.finetune.semi_supervised import KINDS, SemiSupervised
from modicum.finetune.variants import Variant, rates_of, variants, with_teachers
from modicum.loop import Monitor, Training
from modicum.method import find_method
from modicum.networks import Classifier
from modicum.optim import build_optimizer, groups_by_layer, parameter_groups, schedule_with_warmup
from modicum.record import Metrics, is_rank_zero, say
from modicum.resolve import stage_facts, view_arguments
from modicum.session import Session
from modicum.settings import FinetuneSettings
from modicum.views.policies import build_policy

READINGS = 20  # of validation images and of the agreement with the average, over a run
AGREEMENT_IMAGES = 512


def run(session: Session) -> None:
    """Runs the method asked for, then baselines and refits; what is finished is skipped, what is begun goes on."""
    for variant in variants(session):
        for part in with_teachers(variant):
            if not (part.folder / "classifier" / "model.safetensors").is_file():
                train(session, part)


def train(session: Session, variant: Variant) -> None:
    """One fine-tuning run; leaves `classifier/` and `backbone/` in the variant's folder."""
    experiment, images = session.experiment, session.images
    settings = experiment.finetune
    facts = replace(
        stage_facts("finetune", settings.model_dump(), images),
        num_labelled=len(variant.labelled),
        num_unlabelled=len(variant.unlabelled),
        class_shares=tuple(class_shares(images.labels[variant.labelled], images.num_classes).tolist()),
    )
    backbone = initial_backbone(variant.init, experiment, settings.projector_layers)
    if settings.frozen and variant.init is not None:  # the baseline from random weights has to learn all of them
        backbone.freeze()
    method = find_method("finetune", variant.method["name"]).from_settings(backbone, facts, experiment.seed, variant.method)
    assert isinstance(method, SemiSupervised)
    monitors = validation_monitors(session, variant, method)
    variant.folder.mkdir(parents=True, exist_ok=True)
    say(f"{variant.title}: {len(variant.labelled)} labelled images" + (f", {settings.steps} steps" if method.views else ""))
    if not (variant.folder / "state.pt").is_file():  # which holds what these give
        ask_teacher(session, variant, method)
        start_head(session, variant, method, monitors)
    if method.views:
        training(session, variant, method, monitors).run()
    if is_rank_zero():
        save(session, variant, method)
    distributed.barrier()  # until the classifier is there, which may teach the next run


def save(session: Session, variant: Variant, method: SemiSupervised) -> None:
    """The exported weights, as the settings say; no test image has a say in it. Beside them those of other kinds, where they differ."""
    experiment, names = session.experiment, session.images.class_names
    preprocessing = Preprocessing.of(experiment.data)
    exported = method.classifier(experiment.finetune.export)
    if variant.finish != "none":
        exported = copy.deepcopy(exported)
        finish_head(session, variant, method, exported)
    saved = [exported]
    for kind in KINDS if variant.compared else ():
        other = method.classifier(kind)
        if not any(same(other, one) for one in saved):
            saved.append(other)
            save_classifier(variant.folder / "weights" / kind, other, preprocessing, names)
    save_backbone(variant.folder / "backbone", saved[0].backbone, preprocessing)
    save_classifier(variant.folder / "classifier", saved[0], preprocessing, names)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one architecture hold the same weights and statistics."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def training(session: Session, variant: Variant, method: SemiSupervised, monitors: list[Monitor]) -> Training:
    """The steps of one fine-tuning run, on the streams that its method asks for."""
    experiment, images, hardware = session.experiment, session.images, session.hardware
    settings, seed = experiment.finetune, experiment.seed
    rows = {"labelled": variant.labelled, "unlabelled": variant.unlabelled}
    sizes = {"labelled": int(settings.batch_size), "unlabelled": int(settings.batch_size) * int(settings.mu)}
    assert isinstance(settings.views, list)  # resolved, as are the others
    assert isinstance(settings.labelled_views, list)
    chosen = {"labelled": settings.labelled_views, "unlabelled": settings.views}
    policies = {name: [build_policy(policy, **view_arguments(experiment.data)) for policy in views] for name, views in chosen.items()}
    streams = {
        name: Stream.of(
            images,
            rows[name],
            policies[name][: len(views)],  # a baseline takes fewer
            sizes[name],
            hardware.device,
            seed,
            variant.title,
            name,
            labelled=name == "labelled",
            balanced=name == "labelled" and settings.sampling == "balanced",
        )
        for name, views in method.views.items()
    }
    audit = Audit(images, variant.labelled, method, variant.folder, hardware.device)
    epoch = math.ceil(len(rows["unlabelled"]) / sizes["unlabelled"])
    few = min(AGREEMENT_IMAGES, len(variant.unlabelled))
    watched = variant.unlabelled[np.linspace(0, len(variant.unlabelled) - 1, few).astype(int)]
    preprocessing = Preprocessing.of(experiment.data)
    return Training(
        title=variant.title,
        method=method,
        batch=lambda step: {name: stream.sample(step) for name, stream in streams.items()},
        optimizer=build_optimizer(settings.optimizer, optimizer_groups(method, rates_of(variant, settings))),
        schedule=schedule_with_warmup(settings.schedule, settings.warmup_steps / settings.steps),
        steps=settings.steps,
        batch_size=sum(sizes[name] for name in streams),
        folder=variant.folder,
        hardware=hardware,
        seed=seed,
        log_every=settings.log_every,
        observe=audit.observe,
        monitors=[
            *monitors,
            *audit.monitors(settings.log_every, epoch),
            audit.agreement(reading_interval(settings), lambda network: outputs(network, images, watched, preprocessing, hardware)),
        ],
    )


def ask_teacher(session: Session, variant: Variant, method: SemiSupervised) -> None:
    """The pseudo-labels of a round, from plain images."""
    if not isinstance(method, NoisyStudent):
        return
    teacher, preprocessing, _ = load_classifier(Path(variant.method["teacher_from"]))
    said = outputs(teacher, session.images, variant.unlabelled, preprocessing, session.hardware, "the teacher's pseudo-labels")
    method.listen(said.softmax(dim=1))
    say(f"{variant.title}: {int((method.weight > 0).sum()):,} of the teacher's {len(method.weight):,} pseudo-labels count")


def optimizer_groups(method: SemiSupervised, settings: FinetuneSettings) -> list[dict[str, object]]:
    """The head first, whose learning rate is the run's."""
    decay = float(settings.optimizer.weight_decay)
    classifiers = [child for child in method.children() if isinstance(child, Classifier)]  # the student, and a teacher that is trained too
    others = [child for child in method.children() if not isinstance(child, Classifier)]  # projectors; averages have no gradient
    groups = parameter_groups([*((child.head, 1.0) for child in classifiers), *((child, 1.0) for child in others)], decay)
    scale = settings.backbone_lr_scale or 1.0  # 0 freezes it, and leaves no parameter to learn
    if settings.layer_decay == 1:
        return groups + parameter_groups([(child.backbone, scale) for child in classifiers], decay)
    for child in classifiers:
        groups += groups_by_layer(child.backbone.network, scale, settings.layer_decay, decay)
    return groups


def reading_interval(settings: FinetuneSettings) -> int:
    return max(1, settings.steps // READINGS)


def start_head(session: Session, variant: Variant, method: SemiSupervised, monitors: list[Monitor]) -> None:
    """The head that a method without steps is, and that the others may start from."""
    if not (isinstance(method, Propagate) or variant.warm_start == "propagate"):
        return
    method.to(session.hardware.device)
    name = "random" if variant.init is None else "pretrained"
    weight, bias, figures = propagated_head(session, method.student.backbone, variant.labelled, propagation_of(method), name=name)
    method.start_head(weight, bias)
    for monitor in monitors:
        figures |= monitor.read(0)
    Metrics(variant.folder / "metrics.csv", resume_step=-1).write(0, figures)


def finish_head(session: Session, variant: Variant, method: SemiSupervised, classifier: Classifier) -> None:
    """Fits the classifier's head anew, to labels propagated over the features that the training has made, alone or beside its own word."""
    trained = classifier.head if variant.finish == "average" else None
    name = "finetuned" if variant.compared else ""  # of the others stage three asks for other images
    weight, bias, figures = propagated_head(session, classifier.backbone, variant.labelled, propagation_of(method), trained, name)
    classifier.set_head(weight, bias)
    steps = session.experiment.finetune.steps
    Metrics(variant.folder / "metrics.csv", resume_step=steps).write(steps + 1, figures)  # after the last


def propagation_of(method: SemiSupervised) -> Propagation:
    return method.how if isinstance(method, Propagate) else Propagation(prior=method.class_prior)


def validation_monitors(session: Session, variant: Variant, method: SemiSupervised) -> list[Monitor]:
    """Accuracy on the validation part of the labels, where there is one that the run does not train on. Nothing is chosen by it."""
    settings = session.experiment.finetune
    rows = np.setdiff1d(np.flatnonzero(session.splits["split"] == "validation"), variant.labelled)
    if not len(rows):
        return []
    truth, preprocessing = torch.tensor(session.images.labels)[rows], Preprocessing.of(session.experiment.data)

    def read(done: int) -> dict[str, float]:
        classifier = method.classifier(settings.export)
        logits = outputs(classifier, session.images, rows, preprocessing, session.hardware)
        confidence, guesses = logits.softmax(dim=1).max(dim=1)
        right = (guesses == truth).numpy()
        return {"validation_accuracy": float(right.mean()), "validation_calibration_error": calibration_error(confidence.numpy(), right)}

    return [Monitor(reading_interval(settings), read)]
