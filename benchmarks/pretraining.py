"""Images a second of stage one, with data and views, beside lightly and beside its own bare network. `python -m benchmarks pretraining`

Claim: on two cores at least 3 times lightly's throughput with a ResNet-18 (small-image stem) and 4 times with resnet10_small, at equal
architecture, batch (256), views and queue (4096); and at least 85 % of the throughput of the bare network step, so that data, views, queue,
teacher's update, optimizer and log together cost at most 15 %.

Ours is the beginning of a real run of 100 epochs on Fashion-MNIST as 32 px RGB: the training loop itself, each method with its paper's
optimizer, in the precision that the hardware suggests. lightly is what its documented example of the method does, in a process of its own:
its transform on PIL images, a DataLoader (a worker a core, 8 at most), its heads, loss and momentum update, plain SGD, fp32. Its transform
gets our numbers for 32 px (crops from a fifth of the area, no blur, SimCLR's jitter at half strength), which make it faster than its own.
Its momentum encoder normalises by its own batch: `bn` is the same mathematics, `shuffle_bn` our default, `eman` what the shipped configs
take.

The bare step is the method's own forward (its loss included) and backward on random tensors that stand ready. As in a run of that length,
backbones are compiled on several threads of a CPU (`compile: auto`), in both, before the first round. On a GPU the same is measured, in
longer rounds and without bars.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pairs import BARE, Row, Work, apart, compared, device_clock, installed, repeated, steps_a_round, train_in_turn
from benchmarks.pictures import DATA, Pictures, batches, fashion_images
from modicum.compilation import compile_backbones, earns_compilation
from modicum.data.images import Images
from modicum.data.stream import Sample, Stream
from modicum.exchange import initial_backbone
from modicum.hardware import Hardware, choose_hardware
from modicum.loop import Training
from modicum.method import Method, find_method
from modicum.networks import Backbone, create_backbone
from modicum.optim import build_optimizer, parameter_groups, schedule_with_warmup
from modicum.resolve import num_steps, resolve, stage_facts, view_arguments
from modicum.settings import AUTO, Auto, Experiment
from modicum.views.policies import build_policy

NETWORKS = {"resnet18": (3.0, 3), "resnet10_small": (4.0, 5)}  # name -> bar beside lightly, rounds
METHODS: dict[str, dict[str, Any]] = {
    "moco_v2, bn": {"name": "moco_v2", "queue_size": 4096, "teacher": {"norm": "bn"}},
    "moco_v2, eman": {"name": "moco_v2", "queue_size": 4096, "teacher": {"norm": "eman"}},
    "moco_v2, shuffle_bn": {"name": "moco_v2", "queue_size": 4096, "teacher": {"norm": "shuffle_bn"}},
    "simclr": {"name": "simclr"},
    "byol": {"name": "byol", "hidden_size": 1024},  # lightly's example has it narrower than the paper's 4096
}
LIGHTLY = "lightly"


def run(quick: bool) -> Iterator[Row]:
    images, with_lightly = fashion_images(), installed("lightly")
    batch = 16 if quick else 256
    for network, (bar, rounds) in NETWORKS.items():
        if quick and network != "resnet10_small":
            continue
        for title, settings in METHODS.items():
            experiment = experiment_of(images, network, settings, batch, compiled=False if quick else AUTO)
            hardware = choose_hardware(experiment)
            steps, theirs = (1, 1) if quick else steps_a_round(hardware.device)
            with ExitStack() as held:
                folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
                training = begin(experiment, images, hardware, folder)
                others: dict[str, Work] = {BARE: repeated(bare_step(experiment, images, hardware, folder), steps)}
                if with_lightly:
                    peer = held.enter_context(apart(lightly_step, settings["name"], experiment, hardware.device))
                    others[LIGHTLY] = repeated(peer, theirs)
                seconds = train_in_turn(training, steps, others, 1 if quick else rounds, device_clock(hardware.device))
            amounts = {"ours": steps * batch, BARE: steps * batch, LIGHTLY: theirs * batch}
            bars = {BARE: 0.85, LIGHTLY: bar} if hardware.device.type == "cpu" else {}
            yield from compared("pretraining", f"{network}, {title}", seconds, unit="images/s", amounts=amounts, bars=bars)


def experiment_of(images: Images, network: str, method: dict[str, Any], batch: int, compiled: bool | Auto) -> Experiment:
    """A run of 100 epochs with every `auto` of the method decided."""
    asked = {"data": DATA, "backbone": {"name": network}, "pretrain": {"method": method, "batch_size": batch}, "compile": compiled}
    experiment, _ = resolve(Experiment.model_validate(asked), images)
    return experiment


def build_method(experiment: Experiment, images: Images, device: torch.device) -> tuple[Method, Stream]:
    """Method and stream as stage one builds them."""
    settings = experiment.pretrain
    facts = stage_facts("pretrain", settings.model_dump(), images)
    backbone = initial_backbone(None, experiment)
    method = find_method("pretrain", settings.method["name"]).from_settings(backbone, facts, experiment.seed, settings.method)
    views = view_arguments(experiment.data)
    assert isinstance(settings.views, list)  # resolved
    policies = [build_policy(policy, **views) for policy in settings.views]
    rows = images.rows("train")
    return method, Stream.of(images, rows, policies, int(settings.batch_size), device, experiment.seed, "pretrain", "unlabelled")


def begin(experiment: Experiment, images: Images, hardware: Hardware, folder: Path) -> Training:
    """The training run of stage one, without its kNN monitor: a reading every few epochs, which no step waits for."""
    settings = experiment.pretrain
    method, stream = build_method(experiment, images, hardware.device)
    return Training(
        title="pretrain",
        method=method,
        batch=lambda step: {"unlabelled": stream.sample(step)},
        optimizer=build_optimizer(settings.optimizer, parameter_groups([(method, 1.0)], float(settings.optimizer.weight_decay))),
        schedule=schedule_with_warmup(settings.schedule, float(settings.warmup_epochs) / settings.epochs),
        steps=num_steps(settings, len(images.rows("train"))),
        batch_size=int(settings.batch_size),
        folder=folder,
        hardware=hardware,
        seed=experiment.seed,
    )


class Ready(Sample):
    """A sample whose views stand ready: random tensors, whatever is asked for."""

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        return self.rendered[number]


def bare_step(experiment: Experiment, images: Images, hardware: Hardware, folder: Path) -> Work:
    """Forward and backward of the method, and nothing else; compiled, with its code in `folder`, where the run is."""
    method, stream = build_method(experiment, images, hardware.device)
    method.to(hardware.device).to(memory_format=torch.channels_last).train()
    sample = stream.sample(0)
    shape = len(sample), images.channels, images.image_size, images.image_size
    views = {
        number: torch.randn(shape, device=hardware.device).to(memory_format=torch.channels_last) for number in range(len(stream.policies))
    }
    batch: dict[str, Sample] = {"unlabelled": Ready(stream, 0, sample.chosen, views)}
    with hardware.autocast():
        method.prepare(batch)

    def step() -> None:
        method.zero_grad()
        with hardware.autocast():
            loss = method(batch)
        loss.total.backward()

    if not (hardware.compile and earns_compilation(hardware, num_steps(experiment.pretrain, len(images.rows("train"))))):
        return step
    compile_backbones(method, step, folder / "compiled")
    return torch.compiler.set_stance("default")(step)  # which monitors of the loop run without


def lightly_step(name: str, experiment: Experiment, device: torch.device) -> Work:
    """One step of lightly's example of the method: the same architecture, batch and views, all else its own."""
    images = fashion_images()
    backbone = create_backbone(experiment.backbone, images.channels, images.image_size, experiment.seed)
    trained, loss_of = LIGHTLY_METHODS[name](backbone)
    trained.to(device)
    optimizer = torch.optim.SGD([parameter for parameter in trained.parameters() if parameter.requires_grad], lr=0.06)
    loader = batches(Pictures(images, images.rows("train"), lightly_transform(name)), int(experiment.pretrain.batch_size))

    def step() -> None:
        views, _ = next(loader)
        loss = loss_of(*(view.to(device) for view in views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly_transform(name: str) -> Callable[[Any], Any]:
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform, MoCoV2Transform, SimCLRTransform

    small: dict[str, Any] = {"input_size": 32, "min_scale": 0.2, "gaussian_blur": 0.0}
    if name == "byol":
        return BYOLTransform(BYOLView1Transform(**small), BYOLView2Transform(**small))
    return SimCLRTransform(cj_strength=0.5, **small) if name == "simclr" else MoCoV2Transform(**small)


Peer = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]  # what holds all parameters, and the loss of two views


def lightly_moco(backbone: Backbone) -> Peer:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    width = backbone.num_features
    student = nn.Sequential(backbone, MoCoProjectionHead(width, width, 128))
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    criterion = NTXentLoss(memory_bank_size=(4096, 128))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        update_momentum(student, teacher, m=0.996)
        return criterion(student(query), teacher(key))

    return nn.ModuleList([student, teacher, criterion]), loss


def lightly_simclr(backbone: Backbone) -> Peer:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    width = backbone.num_features
    student = nn.Sequential(backbone, SimCLRProjectionHead(width, width, 128))
    criterion = NTXentLoss()
    return student, lambda first, second: criterion(student(first), student(second))


def lightly_byol(backbone: Backbone) -> Peer:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    student = nn.Sequential(backbone, BYOLProjectionHead(backbone.num_features, 1024, 256))
    predictor = BYOLPredictionHead(256, 1024, 256)
    teacher = copy.deepcopy(student)
    deactivate_requires_grad(teacher)
    criterion = NegativeCosineSimilarity()

    def loss(first: Tensor, second: Tensor) -> Tensor:
        update_momentum(student, teacher, m=0.996)
        predictions = predictor(student(first)), predictor(student(second))
        targets = teacher(first), teacher(second)
        return (criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0])) / 2

    return nn.ModuleList([student, predictor, teacher]), loss


LIGHTLY_METHODS: dict[str, Callable[[Backbone], Peer]] = {"moco_v2": lightly_moco, "simclr": lightly_simclr, "byol": lightly_byol}
