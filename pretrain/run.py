"""Stage one from a session: train the method, leave `pretrain/backbone`."""

import math

from torch import nn

from modicum.checkpoint import Preprocessing, save_backbone
from modicum.data.stream import Stream
from modicum.exchange import initial_backbone
from modicum.loop import Monitor, Training
from modicum.method import find_method
from modicum.optim import build_optimizer, parameter_groups, schedule_with_warmup
from modicum.pretrain.monitor import KnnMonitor
from modicum.record import is_rank_zero
from modicum.resolve import num_steps, stage_facts, view_arguments
from modicum.session import Session
from modicum.views.policies import build_policy


def run(session: Session) -> None:
    """Trains from where the state stands, and writes the backbone."""
    experiment, images, hardware = session.experiment, session.images, session.hardware
    settings, folder = experiment.pretrain, session.folder.stage("pretrain")
    facts = stage_facts("pretrain", settings.model_dump(), images)
    backbone = initial_backbone(settings.init, experiment)
    method = find_method("pretrain", settings.method["name"]).from_settings(backbone, facts, experiment.seed, settings.method)

    views = view_arguments(experiment.data)
    rows = images.rows("train")  # test images are in no training stage
    assert isinstance(settings.views, list)  # resolved
    policies = [build_policy(policy, **views) for policy in settings.views]
    stream = Stream.of(images, rows, policies, settings.batch_size, hardware.device, experiment.seed, "pretrain", "unlabelled")
    steps = num_steps(settings, len(rows))
    monitor = KnnMonitor(images, build_policy({"name": "none"}, **views), hardware, experiment.seed)
    every = max(1, math.ceil(float(settings.monitor_epochs) * len(rows) / settings.batch_size))

    paces = {method.get_submodule(name): pace for name, pace in method.paces.items()}
    groups = parameter_groups([(method, 1.0)], float(settings.optimizer.weight_decay), paces)
    Training(
        title="pretrain",
        method=method,
        batch=lambda step: {"unlabelled": stream.sample(step)},
        optimizer=build_optimizer(settings.optimizer, groups),
        schedule=schedule_with_warmup(settings.schedule, float(settings.warmup_epochs) / settings.epochs),
        steps=steps,
        batch_size=settings.batch_size,
        folder=folder,
        hardware=hardware,
        seed=experiment.seed,
        log_every=settings.log_every,
        monitors=[Monitor(every, lambda: monitor.read(backbone))] if monitor.possible else [],
    ).run()
    if is_rank_zero():
        projector = method.get_submodule(method.projector_path) if method.projector_path else None
        assert projector is None or isinstance(projector, nn.Sequential)
        save_backbone(folder / "backbone", backbone, Preprocessing.of(experiment.data), projector)
