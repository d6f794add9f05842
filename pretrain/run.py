"""Stage one from a session: train the method, leave `pretrain/backbone`."""

import math

from torch import nn

from modicum.checkpoint import Preprocessing, save_backbone
from modicum.config import flatten
from modicum.data.stream import Stream
from modicum.exchange import initial_backbone
from modicum.loop import Monitor, Training
from modicum.method import Method, find_method
from modicum.networks import Backbone
from modicum.optim import build_optimizer, parameter_groups, schedule_with_warmup
from modicum.pretrain.collapse import Collapse
from modicum.pretrain.monitor import EmbeddingMonitor, KnnMonitor
from modicum.pretrain.queue import queue_ages
from modicum.record import is_rank_zero
from modicum.resolve import num_steps, stage_facts, view_arguments
from modicum.session import Session
from modicum.views.policies import Policy, build_policy


def run(session: Session) -> None:
    """Trains from where the state stands, and writes the backbone."""
    experiment, images, hardware = session.experiment, session.images, session.hardware
    settings, folder = experiment.pretrain, session.folder.stage("pretrain")
    facts = stage_facts("pretrain", settings.model_dump(), images)
    backbone = initial_backbone(settings.init, experiment)
    method = find_method("pretrain", settings.method["name"]).from_settings(backbone, facts, experiment.seed, settings.method)

    rows = images.rows("train")  # test images are in no training stage
    assert isinstance(settings.views, list)  # resolved
    policies = [build_policy(policy, **view_arguments(experiment.data)) for policy in settings.views]
    batch_size = int(settings.batch_size)
    stream = Stream.of(images, rows, policies, batch_size, hardware.device, experiment.seed, "pretrain", "unlabelled")
    steps = num_steps(settings, len(rows))

    paces = {method.get_submodule(name): pace for name, pace in method.paces.items()}
    groups = parameter_groups([(method, 1.0)], float(settings.optimizer.weight_decay), paces)
    Training(
        title="pretrain",
        method=method,
        batch=lambda step: {"unlabelled": stream.sample(step)},
        optimizer=build_optimizer(settings.optimizer, groups),
        schedule=schedule_with_warmup(settings.schedule, float(settings.warmup_epochs) / settings.epochs),
        steps=steps,
        batch_size=batch_size,
        folder=folder,
        hardware=hardware,
        seed=experiment.seed,
        log_every=settings.log_every,
        monitors=monitors(session, method, backbone, policies, len(rows)) if is_rank_zero() else [],
    ).run()
    if is_rank_zero():
        projector = method.get_submodule(method.projector_path) if method.projector_path else None
        assert projector is None or isinstance(projector, nn.Sequential)
        save_backbone(folder / "backbone", backbone, Preprocessing.of(experiment.data), projector)


def monitors(session: Session, method: Method, backbone: Backbone, policies: list[Policy], num_images: int) -> list[Monitor]:
    """What is watched, by the one process that records it: nothing here moves a weight, a statistic or a random number."""
    experiment, images, hardware = session.experiment, session.images, session.hardware
    settings, folder = experiment.pretrain, session.folder.stage("pretrain")
    plain = build_policy({"name": "none"}, **view_arguments(experiment.data))
    knn = KnnMonitor(images, plain, hardware, experiment.seed)
    collapse = Collapse(folder, method.collapse_causes, flatten(experiment.model_dump()))
    assert isinstance(method.student, nn.Sequential)
    embeddings = EmbeddingMonitor(images, policies, method.student, collapse, folder, hardware, experiment.seed)
    every = max(1, math.ceil(float(settings.monitor_epochs) * num_images / int(settings.batch_size)))
    return [
        *([Monitor(every, lambda _: knn.read(backbone))] if knn.possible else []),
        Monitor(every, embeddings.read),
        Monitor(settings.log_every, lambda _: queue_ages(method)),
    ]
