"""The only training loop, of stage one and stage two alike. It knows methods and steps: no stage, no teacher, no label."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modicum import distributed
from modicum.checkpoint import load_state, refusing, save_state
from modicum.compilation import compile_backbones, earns_compilation
from modicum.data.stream import Batch
from modicum.errors import InputError, Preempted
from modicum.hardware import Hardware, has_fast_bf16
from modicum.method import Method, Progress
from modicum.optim import Schedule, learning_rate
from modicum.randomness import seed_of
from modicum.record import Metrics, is_rank_zero, progress, say, warn
from modicum.signals import StopSignal

Reading = tuple[Tensor, Tensor]  # numerator and denominator, summed over the steps of a log interval before they are divided
SAVE_SECONDS = 30.0


@dataclass
class Monitor:
    """Something read now and then between steps: named figures, after so many steps. It must leave the run's course untouched."""

    every: int  # steps
    read: Callable[[int], dict[str, float]]


@dataclass
class Training:
    """One training run: what is trained, on what, for how long, and where its state lies."""

    title: str
    method: Method
    batch: Callable[[int], Batch]  # step -> the batch of that step
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    steps: int
    batch_size: int  # images a step, for the rate shown
    folder: Path
    hardware: Hardware
    seed: int
    log_every: int = 20
    observe: Callable[[], Mapping[str, Reading]] = dict  # figures of the step just made
    monitors: list[Monitor] = field(default_factory=list)

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    def run(self) -> None:
        """Trains to the last step, from the saved state where there is one.

        Raises Interrupted or Preempted after saving, and InputError when loss or state are no longer finite.
        """
        method = self.method.to(self.hardware.device).to(memory_format=torch.channels_last).train()
        totals = _Totals()
        start = self._resume(totals)
        if self.hardware.precision == "bf16" and not has_fast_bf16(self.hardware.device):
            why = "with which the saved state began" if start else "as asked for"
            warn(f"{self.title}: this processor has no bf16 of its own, so that precision = bf16, {why}, takes many times as long as fp32.")
        torch.set_num_threads(self.hardware.threads)
        self._compile(start)
        hardware = self.hardware
        metrics = Metrics(self.folder / "metrics.csv", start)
        trained: nn.Module = method
        if distributed.world_size() > 1:
            trained = distributed.Parallel(method)
            if method.norm == "bn" and any(isinstance(module, _BatchNorm) for module in method.modules()):
                warn(
                    f"{self.title}: each of the {distributed.world_size()} ranks normalises by its own images, so that results depend on "
                    "the number of ranks; with norm: sync_bn they do not."
                )
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        own = [distributed.rank()] if distributed.world_size() > 1 else []
        saved_at = time.monotonic()
        bar = progress(self.title, self.steps * self.batch_size, completed=start * self.batch_size)
        with StopSignal() as stop, hardware.host_work(), bar as advance:
            for step in range(start, self.steps):
                torch.manual_seed(seed_of(self.seed, self.title, step, *own))  # dropout and its kin

                method.progress = Progress(step, self.steps)
                batch = self.batch(step)
                if step == 0:
                    # Its own autocast: weights cast without gradient would be kept for the step.
                    with hardware.autocast(), hardware.uncompiled():
                        method.prepare(batch)
                with hardware.autocast():
                    loss = trained(batch)
                self.optimizer.zero_grad()
                loss.total.backward()
                finite = mask_unless_finite(loss.total, parameters)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(group, self.optimizer.defaults["lr"], self.schedule, step / self.steps)
                self.optimizer.step()
                method.after_step(Progress(step + 1, self.steps))

                one = torch.ones_like(finite)
                figures = {"loss": loss.total, **{f"loss/{name}": part for name, part in loss.parts.items()}}
                totals.add(
                    {"finite": (finite, one)} | {name: (part.detach(), one) for name, part in figures.items()} | dict(self.observe())
                )
                done = step + 1
                last = done == self.steps
                if done % self.log_every == 0 or last:
                    values = totals.read()  # a sync point, as the only one between two log steps
                    self._check(values.pop("finite"), done)
                    values["lr"] = self.optimizer.param_groups[0]["lr"]
                    metrics.write(done, values)
                    advance(0, note=f"loss {values['loss']:.3f}")
                for monitor in self.monitors:
                    if done % monitor.every == 0 or last:
                        with hardware.uncompiled():
                            metrics.write(done, monitor.read(done))
                advance(self.batch_size)
                stopping = distributed.anywhere(stop.requested is not None)
                if stopping or last or distributed.anywhere(time.monotonic() - saved_at > SAVE_SECONDS):
                    self._save(done, totals)
                    saved_at = time.monotonic()
                if stopping and not last:
                    distributed.barrier()  # until the state is saved: a rank that ends takes the others with it
                    raise (stop.requested or Preempted)(
                        f"Stopped after step {done} of {self.steps}; the state is saved and the same command goes on from there."
                    )

    def _resume(self, totals: "_Totals") -> int:
        if not self.state_path.is_file():
            return 0
        state = load_state(self.state_path)
        with refusing(f"The state {self.state_path} does not fit this method", "; delete it to start this stage anew"):
            self.method.load_state_dict(state["method"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.hardware = replace(self.hardware, **state["hardware"])  # they move the last bits
            totals.take(state["totals"], self.hardware.device)
            return int(state["step"])

    def _compile(self, start: int) -> None:
        """Settles whether backbones are compiled, which a step for nothing shows: the state is then as it was."""
        if self.hardware.compile == "auto":
            self.hardware = replace(self.hardware, compile=earns_compilation(self.hardware, self.steps))
        if not self.hardware.compile:
            return
        say(f"{self.title}: the backbone is compiled for {self.steps:,} steps, which takes a minute or more")
        before = copy.deepcopy(self.method.state_dict())

        def step() -> None:
            self.method.progress = Progress(start, self.steps)
            with self.hardware.autocast():
                loss = self.method(self.batch(start))
            loss.total.backward()

        try:
            took = compile_backbones(self.method, step, self.folder / "compiled")
            say(f"{self.title}: compiled in {took}")
        except RuntimeError as error:
            self.hardware = replace(self.hardware, compile=False)
            warn(f"{self.title}: not compiled, which changes nothing but speed ({str(error).strip().splitlines()[0]})")
        self.method.zero_grad()
        self.method.load_state_dict(before)

    def _save(self, step: int, totals: "_Totals") -> None:
        """Rank 0 writes. Raises InputError for a state that is lost, which does not replace the one before it."""
        sums = totals.of_all_ranks()
        if self._spoilt():
            raise self._lost("state", step)
        if not is_rank_zero():
            return
        state = {"step": step, "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(), "totals": sums}
        hardware = {name: getattr(self.hardware, name) for name in ("precision", "threads", "compile")}
        save_state(self.state_path, state | {"hardware": hardware})

    def _check(self, finite_share: float, step: int) -> None:
        if finite_share == 1:
            return
        if finite_share == 0 or self._spoilt():
            raise self._lost("loss", step)
        warn(f"{1 - finite_share:.0%} of the last steps up to {step} had no finite gradient, which counted as zero.")

    def _spoilt(self) -> bool:
        """Whether an entry of rank 0's state, norms and queues too, is not finite; every rank must ask. A sync point for each."""
        values = self.method.state_dict().values() if is_rank_zero() else ()
        return distributed.anywhere(not all(value.isfinite().all() for value in values))

    def _lost(self, what: str, step: int) -> InputError:
        advice = "Lower the learning rate, or set precision=fp32"
        if self.state_path.is_file():
            advice = (
                f"The last finite state stands in {self.state_path}, but goes on with the same settings alone. {advice}, and begin anew: "
                "by --run in another folder, or by --force, which deletes that state"
            )
        return InputError(f"The {what} of {self.title} is no longer finite at step {step}. {advice}.")


class _Totals:
    """Sums of numerators and denominators since the last log step, each rank's own, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, readings: Mapping[str, Reading]) -> None:
        for name, reading in readings.items():
            pair = torch.stack([part.float() for part in reading])
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    @torch.no_grad()
    def of_all_ranks(self) -> dict[str, Tensor]:
        """(ranks, 2) of each name; every rank must ask at the same step."""
        if not self.sums:
            return {}
        everyone = distributed.gather(torch.stack(list(self.sums.values()))[None])  # of all names at once
        return dict(zip(self.sums, everyone.unbind(1), strict=True))

    def take(self, kept: Mapping[str, Tensor], device: torch.device) -> None:
        """This rank's part of what `of_all_ranks` gave; where their number was another, the first takes all."""
        for name, values in kept.items():
            pairs = values.view(-1, 2)  # earlier versions kept rank 0's alone
            own = pairs[distributed.rank()] if len(pairs) == distributed.world_size() else pairs.sum(0) * is_rank_zero()
            self.sums[name] = own.to(device)

    def read(self) -> dict[str, float]:
        """The ratios over all ranks, and an empty sum again. A reading without any image in its denominator is left out."""
        values = {name: pairs.sum(0).tolist() for name, pairs in self.of_all_ranks().items()}
        self.sums = {}
        return {name: above / below for name, (above, below) in values.items() if below}


def mask_unless_finite(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Zeroes all gradients unless loss and gradients are finite, without asking the device. Returns 1.0 or 0.0 on the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    finite = torch.isfinite(torch.nn.utils.get_total_norm(gradients)) & torch.isfinite(loss.detach())
    spoilt = ~finite
    for gradient in gradients:
        gradient.masked_fill_(spoilt, 0)
    return finite.float()
