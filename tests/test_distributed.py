"""Two gloo ranks give the loss and the gradients of one process, where the mathematics says so."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from timm.layers import BatchNormAct2d
from torch import nn

import modicum
from modicum import distributed
from modicum.data.images import Images
from modicum.data.sources import load_images
from modicum.data.stream import Stream
from modicum.hardware import Hardware
from modicum.loop import Training
from modicum.method import Facts, Loss, Method, Progress, find_method, method_names, settings_model
from modicum.optim import SCHEDULES, parameter_groups
from modicum.record import Metrics
from modicum.settings import DataSettings, TeacherSettings
from modicum.views.policies import build_policy

RANKS, BATCH, LABELLED = 2, 16, 40
SHORT = "pretrain.batch_size=64", "pretrain.epochs=0.5", "pretrain.warmup_epochs=0", "pretrain.log_every=1"
SMALL = {"hidden_size": 24, "embedding_size": 12}
VIEW = {"image_size": 16, "channels": 1, "mirror": False, "mean": [0.5], "std": [0.25]}


class NormFree(nn.Module):
    """A backbone without batch norm: its features of an image depend on nothing else."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, self.num_features)
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class Normed(nn.Module):
    """A small convolutional backbone with batch norm: its features of an image depend on the images beside it."""

    num_features = 12

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(1, 8, 3, stride=2), BatchNormAct2d(8), nn.Conv2d(8, self.num_features, 3), nn.BatchNorm2d(self.num_features)
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).relu().mean(dim=(2, 3))


def streams_of(method: Method, images: Images) -> dict[str, Stream]:
    rows = images.rows("train")
    rows_of = {"labelled": rows[:LABELLED], "unlabelled": rows}
    return {
        name: Stream.of(
            images,
            rows_of[name],
            [build_policy({"name": policy}, **VIEW) for policy in policies],
            BATCH,
            torch.device("cpu"),
            0,
            name,
            labelled=name == "labelled",
        )
        for name, policies in method.views.items()
    }


def two_steps(images: Images, backbone: type[nn.Module], name: str, norm: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The losses of two steps, and what they leave: gradients of the second, queue, teacher, memories and running statistics."""
    stage = "pretrain" if name in method_names("pretrain") else "finetune"
    averages = {"ema_momentum": 0.9, "num_labelled": LABELLED, "num_unlabelled": 1347, "class_shares": (0.1,) * 10}
    facts = Facts(1347, 10, 16, 100, BATCH, norm, **averages)
    method = find_method(stage, name).from_settings(backbone(), facts, 0, settings)  # type: ignore[arg-type]
    streams = streams_of(method, images)
    method.prepare({name: stream.sample(0) for name, stream in streams.items()})
    trained = distributed.Parallel(method) if distributed.world_size() > 1 else method
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        method.progress = Progress(50 + step, 100)  # where no ramp is at zero
        loss = trained({name: stream.sample(step) for name, stream in streams.items()}).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(method.progress)
        losses.append(distributed.gather(loss.detach().reshape(1)).mean())
    gradients = {f"gradient of {key}": value.grad for key, value in method.named_parameters() if value.grad is not None}
    return {"losses": torch.stack(losses)} | gradients | method.state_dict()


def join(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    port = (Path(folder) / "port").read_text()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.start(torch.device("cpu"))


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def teacher(norm: str, **more: Any) -> dict[str, Any]:
    return {"teacher": TeacherSettings(norm=norm, momentum=0.9, **more)}


# Backbone, method, norm, settings. None may depend on ranks but the last, without which the comparison would prove nothing.
CASES: dict[str, tuple[type[nn.Module], str, str, dict[str, Any]]] = {
    "moco_v2-no_norm": (NormFree, "moco_v2", "bn", {"queue_size": 64, **teacher("bn")}),
    "moco_v2-no_norm-symmetric": (NormFree, "moco_v2", "bn", {"queue_size": 64, "symmetric": True, **teacher("bn")}),
    "moco_v2-no_norm-shuffle_bn": (NormFree, "moco_v2", "bn", {"queue_size": 40, **teacher("shuffle_bn", groups=2)}),
    "moco_v2-shuffle_bn": (Normed, "moco_v2", "bn", {"queue_size": 40, **teacher("shuffle_bn", groups=4)}),
    "moco_v2-sync_bn": (Normed, "moco_v2", "bn", {"queue_size": 64, **teacher("sync_bn")}),
    "moco_v2-sync_bn-eman": (Normed, "moco_v2", "sync_bn", {"queue_size": 64, **teacher("eman")}),
    "byol-sync_bn": (Normed, "byol", "bn", {"hidden_size": 32, "embedding_size": 16, **teacher("sync_bn")}),
    "simclr-sync_bn": (Normed, "simclr", "sync_bn", {"temperature": 0.1}),
    "simclr-isotropy-sync_bn": (Normed, "simclr", "sync_bn", {"temperature": 0.1, "isotropy_weight": 0.1}),
    "simsiam-sync_bn": (Normed, "simsiam", "sync_bn", {"embedding_size": 24}),
    "barlow_twins-sync_bn": (NormFree, "barlow_twins", "sync_bn", {"embedding_size": 6}),
    # In the proportions of the paper, a 25th of its size, so that rounding is compared with gradients of about 1.
    "vicreg-sync_bn": (
        Normed,
        "vicreg",
        "sync_bn",
        {"embedding_size": 12, "invariance_weight": 1.0, "variance_weight": 1.0, "covariance_weight": 0.04},
    ),
    "moco_v3-sync_bn": (Normed, "moco_v3", "bn", {**SMALL, "temperature": 0.2, "head_layers": 2, **teacher("sync_bn")}),
    "moco_v3-shuffle_bn": (
        Normed,
        "moco_v3",
        "bn",
        {**SMALL, "temperature": 0.2, "head_layers": 2, **teacher("shuffle_bn", groups=4)},
    ),
    "swav-sync_bn": (Normed, "swav", "sync_bn", {**SMALL, "epsilon": 0.05, "num_prototypes": 12, "queue_size": 16, "queue_epochs": 0}),
    "w_mse-sync_bn": (NormFree, "w_mse", "sync_bn", {"hidden_size": 24, "sub_batch": 16, "embedding_size": 4}),
    "dino-no_norm": (NormFree, "dino", "bn", {**SMALL, "num_prototypes": 16, "head_norm": False, **teacher("bn")}),
    "dino-sync_bn": (Normed, "dino", "bn", {**SMALL, "num_prototypes": 16, "head_norm": True, **teacher("sync_bn")}),
    "simclr-bn": (Normed, "simclr", "bn", {"temperature": 0.1}),
}
# Those that blend the images of a batch find their partners on their own rank; distill and noisy_student learn from another run.
APART = {"mixmatch", "remixmatch", "pseudo_label_mixup", "distill", "noisy_student"}
DECIDED = {"momentum": 0.9, "radius": 4.0, "threshold": 0.12, "memory_size": 40, "xi": 1.0}
STAGE_TWO = [name for name in method_names("finetune") if find_method("finetune", name).views and name not in APART]


def chosen(name: str) -> dict[str, Any]:
    fields = settings_model(find_method("finetune", name)).model_fields
    return {key: value for key, value in (DECIDED | teacher("eman")).items() if key in fields}


CASES |= {f"{name}-sync_bn": (Normed, name, "sync_bn", chosen(name)) for name in STAGE_TWO}


def worker(rank: int, folder: str, images: Images) -> None:
    join(rank, folder)
    for name, case in CASES.items():
        result = two_steps(images, *case)
        if rank == 0:
            torch.save(result, f"{folder}/{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images(DataSettings(name="digits"))


@pytest.fixture(scope="module")
def two_ranks(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the outcome of every case on two ranks lies."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "port").write_text(free_port())
    multiprocessing.spawn(worker, (str(folder), images), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("name", [name for name in CASES if name != "simclr-bn"])
def test_two_ranks_equal_one(name: str, images: Images, two_ranks: Path) -> None:
    """Losses, gradients (which are averaged over ranks), queue, teacher and running statistics."""
    there, here = torch.load(two_ranks / f"{name}.pt", weights_only=True), two_steps(images, *CASES[name])
    assert there.keys() == here.keys()
    torch.testing.assert_close(there["losses"], here["losses"], rtol=0, atol=1e-5)
    # Of shuffled groups rank 0 sees its own alone, so that running statistics, which are rank 0's, differ.
    compared = [key for key in here if "shuffle_bn" not in name or not re.search("running|tracked", key)]
    assert any(key.startswith("gradient") for key in compared)
    for key in compared:
        torch.testing.assert_close(there[key], here[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_plain_batch_norm_depends_on_ranks(images: Images, two_ranks: Path) -> None:
    there, here = torch.load(two_ranks / "simclr-bn.pt", weights_only=True), two_steps(images, *CASES["simclr-bn"])
    assert not torch.allclose(there["losses"], here["losses"], atol=1e-3)


class Remembering(Normed):
    """With a memory beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3))


def statistics_worker(rank: int, folder: str) -> None:
    join(rank, folder)
    network = Remembering()
    trained = distributed.Parallel(network)
    network.memory.fill_(rank)
    for seed in range(2):
        trained(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(RANKS * seed + rank))).sum().backward()
        torch.save({name: value.clone() for name, value in network.named_buffers()}, f"{folder}/{seed}-{rank}.pt")
    dist.destroy_process_group()


def test_of_all_buffers_norm_statistics_alone_are_those_of_rank_0_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(free_port())
    multiprocessing.spawn(statistics_worker, (str(tmp_path),), nprocs=RANKS)
    first, second = ([torch.load(tmp_path / f"{seed}-{rank}.pt", weights_only=True) for rank in range(RANKS)] for seed in range(2))
    assert [buffers["memory"].tolist() for buffers in second] == [[0] * 3, [1] * 3]  # not sent
    name = "layers.1.running_mean"
    assert not torch.allclose(first[0][name], first[1][name])  # each rank has moved its own
    alone = Remembering()
    alone.load_state_dict(first[0], strict=False)  # rank 1 goes on from rank 0's
    alone(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(RANKS + 1)))
    torch.testing.assert_close(second[1][name], alone.get_buffer(name))


def gather_worker(rank: int, folder: str) -> None:
    join(rank, folder)
    rows = (torch.arange(6.0).reshape(2, 3) + 10 * rank).requires_grad_()
    own = torch.zeros(2 * RANKS, 3, requires_grad=True)
    twice = own + own  # before the gathering, so that its gradient comes after
    everyone = distributed.gather(rows)
    ((everyone + twice).square().sum() * (rank + 1)).backward()  # the loss of each rank reads the rows of all
    torch.save((everyone.detach(), rows.grad, own.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gather_keeps_rank_order_and_its_gradient_is_the_sum_over_ranks(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(free_port())
    multiprocessing.spawn(gather_worker, (str(tmp_path),), nprocs=RANKS)
    first = torch.arange(6.0).reshape(2, 3)
    for rank in range(RANKS):
        everyone, gradient, own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(everyone, torch.cat([first, first + 10]))
        assert torch.equal(own, 4 * (rank + 1) * everyone)  # what is not gathered keeps this rank's
        assert torch.equal(gradient, 3 * 2 * (first + 10 * rank))


class Drawing(Method):
    """Keeps what it draws in a step, as dropout would."""

    drawn: list[torch.Tensor]
    losses: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.student, self.drawn, self.losses = nn.Linear(3, 1), [], []

    def forward(self, batch: Any) -> Loss:
        self.drawn.append(torch.rand(3))
        loss = self.student(self.drawn[-1]).sum()
        self.losses.append(loss.detach())
        return Loss(loss)


def drawing_worker(rank: int, folder: str) -> None:
    join(rank, folder)
    method, hardware = Drawing(), Hardware(torch.device("cpu"), "fp32", 1)
    optimizer = torch.optim.SGD(parameter_groups([(method, 1.0)], 0.0), lr=0.1)
    Training("drawing", method, lambda step: {}, optimizer, SCHEDULES["constant"], 2, RANKS, Path(folder), hardware, 0).run()
    torch.save((torch.stack(method.drawn), torch.stack(method.losses)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_drop_different_things_and_metrics_are_of_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(free_port())
    multiprocessing.spawn(drawing_worker, (str(tmp_path),), nprocs=RANKS)
    drawn, losses = map(torch.cat, zip(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)), strict=True))
    assert len(drawn.unique(dim=0)) == 2 * RANKS
    told = {name: value for _, name, value in Metrics.read(tmp_path / "metrics.csv")}
    assert told["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept["totals"] == {}  # all was told at the last step


def torchrun(run: Path, *arguments: str) -> subprocess.Popen[str]:
    """`modicum pretrain digits` on two ranks; without the `--` torchrun takes --run for an option of its own."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", "-m", "modicum.cli", "--"]
    return start([*launcher, "pretrain", "digits", *arguments, "--run", str(run)])


def nproc(run: Path, *arguments: str) -> subprocess.Popen[str]:
    return start(["modicum.cli", "pretrain", "digits", "--nproc", str(RANKS), *arguments, "--run", str(run)])


def start(module: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        env=os.environ | {"PYTHONPATH": str(Path(modicum.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_under_torchrun_one_rank_writes_and_a_signal_saves(tmp_path: Path) -> None:
    whole = torchrun(tmp_path / "whole", *SHORT)
    told = whole.communicate()[1]
    assert whole.returncode == 0, told
    assert told.count("Stage one, pretrain: begins") == 1
    assert told.count("each of the 2 ranks normalises by its own images") == 1
    assert sorted(path.name for path in (tmp_path / "whole" / "pretrain").iterdir()) == [
        "backbone",
        "console.log",
        "done.json",
        "metrics.csv",
        "similarities.csv",
        "state.pt",
    ]
    assert [step for step, name, _ in Metrics.read(tmp_path / "whole" / "pretrain" / "metrics.csv") if name == "loss"] == list(range(1, 12))

    stopped = tmp_path / "stopped" / "pretrain"
    process = torchrun(tmp_path / "stopped", *SHORT)
    while not (stopped / "metrics.csv").is_file() or len(Metrics.read(stopped / "metrics.csv")) < 4:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[1]
    assert "the state is saved" in told
    assert not (stopped / "backbone").exists()
    again = nproc(tmp_path / "stopped", *SHORT)
    told = again.communicate()[1]
    assert again.returncode == 0, told
    assert "goes on" in told
    for name in ("metrics.csv", "backbone/model.safetensors"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / "pretrain" / name).read_bytes()
