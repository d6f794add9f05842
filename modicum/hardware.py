"""One device, precision and thread count for a run, chosen in this one place, and memory that is kept from step to step."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from modicum.errors import InputError
from modicum.settings import Auto, Experiment

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_MAX = -1, -4  # glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX


@dataclass(frozen=True)
class Hardware:
    """Where and how a run computes. All but the device moves the last bits, so a resumed run takes it from its state."""

    device: torch.device
    precision: str  # bf16 | fp32
    threads: int
    compile: bool | Auto = False  # the student's backbone, in training

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 where chosen: matrix products and convolutions in bf16, everything delicate in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def gains_by_compiling(self) -> bool:
        """Whether a long stage may: where several threads of a CPU share narrow layers it does, and seldom loses (docs/settings.md)."""
        return self.device.type == "cpu" and self.threads > 1

    @contextlib.contextmanager
    def host_work(self) -> Iterator[None]:
        """Within, the CPU beside a GPU works with one thread: the draws of a batch of views are too small to gain by more, and wait for
        all of them where other processes hold the cores (on 16 busy ones 60 ms a view instead of 6)."""
        before = torch.get_num_threads()
        if self.device.type != "cpu":
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def uncompiled(self) -> contextlib.AbstractContextManager[object]:
        """For what is done seldom: in evaluation mode or at another batch size a compiled network would be compiled once more."""
        return torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext()

    def describe(self) -> str:
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        )
        compiled = {True: ", compiled", False: "", "auto": ", compiled if a stage is long" if self.gains_by_compiling else ""}
        return f"{self.device}, {name}, {self.precision}{compiled[self.compile]}"


Function = TypeVar("Function", bound=Callable[..., torch.Tensor])


def in_full_precision(function: Function) -> Function:
    """A loss or the like, a tensor first, kept out of autocast: bf16 cannot tell similarities apart that differ by less than 0.004."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **options: Any) -> torch.Tensor:
        kind = arguments[0].device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*arguments, **options)
        with torch.autocast(kind, enabled=False):
            return function(*arguments, **options)

    return cast(Function, wrapped)


def usable_cores() -> int:
    """CPU cores that this process may use: its share where torchrun started several on the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that the host does not wait for. Only pinned memory can be copied so, and only CUDA knows it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def choose_hardware(experiment: Experiment) -> Hardware:
    """The hardware that `device` and `precision` ask for. Raises InputError for a device this machine lacks.

    From then on the process keeps the memory that it frees, and cuDNN sums in the same order each time.
    """
    keep_freed_memory()
    torch.backends.cudnn.deterministic = True  # else fp32 gradients of convolutions differ from run to run
    device, ranks = _device(experiment.device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        raise InputError(
            f"{ranks} ranks need a GPU each, but this machine has {torch.cuda.device_count()}: start fewer, or set device=cpu."
        )
    if device.index is not None and ranks > 1:
        raise InputError(f"{ranks} ranks need a GPU each, and device = {device} is one: set device=cuda.")
    precision = experiment.precision
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return Hardware(device, precision, torch.get_num_threads(), experiment.compile)


def keep_freed_memory() -> None:
    """Lets glibc serve large tensors, too, from memory that was freed before.

    By itself it asks the kernel for every one above 32 MiB, and gives it back: each step would then wait for the same pages to be
    cleared anew. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(MALLOC_MMAP_MAX, 0)
        set_option(MALLOC_TRIM_THRESHOLD, -1)


def _device(name: str) -> torch.device:
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "mps" if available["mps"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device = {name!r} is not possible: choose auto, cpu, cuda, cuda:N or mps.") from None
    if not available.get(device.type, False) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"device = {name!r} is not there; this machine has {', '.join(key for key, there in available.items() if there)}.")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products in bf16 are faster there than in fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older torch cannot tell
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False
