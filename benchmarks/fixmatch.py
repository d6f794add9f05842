"""One step of FixMatch beside the usual PyTorch re-implementation. `python -m benchmarks fixmatch`

Claim: WideResNet-28-2, 64 labelled and 7 x 64 unlabelled images of 32 px a step, on two cores: at least 7 times as fast in our default
arrangement (weak views apart, without gradient), at least 4 times with `weak_in_batch`, which does the same work as the peer.

Ours is the beginning of a real run of stage two, compiled as one of its length is on several threads of a CPU: the training loop, the
views, the audit of the pseudo-labels, the average. The peer has the structure that the common re-implementations share, written here with
torchvision's transforms and two DataLoaders (a worker a core, 8 at most), in a process of its own: images one by one through PIL,
labelled, weak and strong views interleaved through one pass, masked cross-entropy, SGD with Nesterov momentum, an average of all weights
after each step, fp32.
"""

import copy
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.pairs import Row, Work, apart, compared, device_clock, repeated, steps_a_round, train_in_turn
from benchmarks.pictures import DATA, Pictures, batches, fashion_images
from modicum.data.images import Images
from modicum.data.stream import Stream
from modicum.finetune.audit import Audit
from modicum.hardware import Hardware, choose_hardware
from modicum.loop import Training
from modicum.method import find_method
from modicum.networks import Backbone, Classifier
from modicum.optim import build_optimizer, parameter_groups, schedule_with_warmup
from modicum.resolve import resolve, stage_facts, view_arguments
from modicum.settings import AUTO, Experiment
from modicum.views.policies import build_policy

ARRANGEMENTS = {"weak views apart": (False, 7.0), "weak_in_batch": (True, 4.0)}  # name -> setting, bar
LABELS = 4000
PEER = "torchvision, DataLoader, fp32"


class Block(nn.Module):
    """Norm and activation before each convolution (He 2016, arXiv:1603.05027); the shortcut starts behind the first where widths differ."""

    def __init__(self, width: int, wider: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(wider)])
        self.first = nn.Conv2d(width, wider, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.shortcut = None if width == wider else nn.Conv2d(width, wider, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norms[0](x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.second(F.relu(self.norms[1](self.first(active))))


class WideResNet(Backbone):
    """WRN-28-2 without its classifier (Zagoruyko 2016, arXiv:1605.07146): images (B, C, 32, 32) -> features (B, 128)."""

    num_features = 128

    def __init__(self, channels: int = 3, blocks: int = 4, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        nn.Module.__init__(self)  # timm has no such network
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for number, (width, wider) in enumerate(pairwise(widths)):
            layers.append(Block(width, wider, 2 if number else 1))
            layers += [Block(wider, wider, 1) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.blocks(self.stem(images)))).mean(dim=(2, 3))


def run(quick: bool) -> Iterator[Row]:
    images = fashion_images()
    batch = 2 if quick else 64
    for title, (weak_in_batch, bar) in ARRANGEMENTS.items():
        method = {"name": "fixmatch", "weak_in_batch": weak_in_batch}
        asked = {
            "data": DATA,
            "finetune": {"method": method, "labels": LABELS, "batch_size": batch, "steps": 100_000},
            "compile": False if quick else AUTO,
        }
        experiment, _ = resolve(Experiment.model_validate(asked), images)
        hardware = choose_hardware(experiment)
        peer = apart(peer_step, batch, int(experiment.finetune.mu), hardware.device)
        steps, theirs = (1, 1) if quick else steps_a_round(hardware.device)
        with peer as step, tempfile.TemporaryDirectory() as folder:
            training = begin(experiment, images, hardware, Path(folder))
            others = {PEER: repeated(step, theirs)}
            seconds = train_in_turn(training, steps, others, 1 if quick else 5, device_clock(hardware.device))
        each = {name: [value / (steps if name == "ours" else theirs) for value in values] for name, values in seconds.items()}
        bars = {PEER: bar} if hardware.device.type == "cpu" else {}
        yield from compared("fixmatch", f"WRN-28-2, {title}", each, unit="s a step", bars=bars)


def begin(experiment: Experiment, images: Images, hardware: Hardware, folder: Path) -> Training:
    """The training run as stage two builds it, on another backbone."""
    settings, seed = experiment.finetune, experiment.seed
    backbone = WideResNet(images.channels)
    facts = stage_facts("finetune", settings.model_dump(), images)
    method: Any = find_method("finetune", "fixmatch").from_settings(backbone, facts, seed, settings.method)
    train = images.rows("train")
    rows = {"labelled": train[:LABELS], "unlabelled": train}
    sizes = {"labelled": int(settings.batch_size), "unlabelled": int(settings.batch_size) * int(settings.mu)}
    assert isinstance(settings.views, list)  # resolved
    policies = [build_policy(policy, **view_arguments(experiment.data)) for policy in settings.views]
    streams = {
        name: Stream.of(
            images, rows[name], policies[: len(views)], sizes[name], hardware.device, seed, "fixmatch", name, labelled=name == "labelled"
        )
        for name, views in method.views.items()
    }
    groups = parameter_groups([(method.student, 1.0)], float(settings.optimizer.weight_decay))
    return Training(
        title="fixmatch",
        method=method,
        batch=lambda step: {name: stream.sample(step) for name, stream in streams.items()},
        optimizer=build_optimizer(settings.optimizer, groups),
        schedule=schedule_with_warmup(settings.schedule, 0.0),
        steps=settings.steps,
        batch_size=sum(sizes.values()),
        folder=folder,
        hardware=hardware,
        seed=seed,
        observe=Audit(images, rows["labelled"], method, folder, hardware.device).observe,
    )


class WeakAndStrong:
    """Both views of an image, by torchvision's transforms."""

    def __init__(self) -> None:
        moved = [v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4, padding_mode="reflect")]
        floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)]
        self.weak = v2.Compose([*moved, *floats])
        self.strong = v2.Compose([*moved, v2.RandAugment(2, 10), *floats, v2.RandomErasing(1.0, (0.25, 0.25), (1.0, 1.0))])

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        return self.weak(image), self.strong(image)


def peer_step(batch: int, mu: int, device: torch.device) -> Work:
    images = fashion_images()
    both, train = WeakAndStrong(), images.rows("train")
    labelled = batches(Pictures(images, train[:LABELS], both.weak), batch)
    unlabelled = batches(Pictures(images, train, both), batch * mu)
    student = Classifier(WideResNet(images.channels), images.num_classes).to(device)
    average = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
    mixed = torch.arange(batch * (1 + 2 * mu), device=device).view(-1, 1 + 2 * mu).T.reshape(-1)
    back = mixed.argsort()

    def step() -> None:
        (images_x, targets_x), ((weak, strong), _) = next(labelled), next(unlabelled)
        inputs = torch.cat([images_x, weak, strong]).to(device)
        logits = student(inputs[mixed])[back]
        logits_x, logits_weak, logits_strong = logits.split([batch, batch * mu, batch * mu])
        confidence, guess = logits_weak.detach().softmax(dim=1).max(dim=1)
        used = (confidence >= 0.95).float()
        loss = F.cross_entropy(logits_x, targets_x.to(device)) + (F.cross_entropy(logits_strong, guess, reduction="none") * used).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), student.parameters(), strict=True):
                mean.mul_(0.999).add_(weight, alpha=0.001)
            for copied, statistic in zip(average.buffers(), student.buffers(), strict=True):
                copied.copy_(statistic)

    return step
