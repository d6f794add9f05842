"""What frozen networks say of plain images, and who is near whom among them: asked once, whichever stage or run of a sweep asks again."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from modicum.checkpoint import Preprocessing
from modicum.data.images import Images
from modicum.files import write_atomically
from modicum.hardware import Hardware
from modicum.neighbours import nearest_others
from modicum.record import is_rank_zero, progress
from modicum.session import Session
from modicum.views import build_policy

BATCH = 512


def prepare(pixels: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """uint8 (B, C, S, S) -> normalised float32 on `device`, channels last: the views of policy `none`."""
    _, channels, _, side = pixels.shape
    plain = build_policy({"name": "none"}, image_size=side, channels=channels, mirror=False, mean=preprocessing.mean, std=preprocessing.std)
    return plain(pixels.to(device), {}).contiguous(memory_format=torch.channels_last)


@contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Within, norms use their running statistics and nothing is dropped; afterwards the mode is as it was."""
    mode = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(mode)


@torch.no_grad()
def outputs(
    network: nn.Module,
    images: Images,
    rows: np.ndarray,
    preprocessing: Preprocessing,
    hardware: Hardware,
    title: str = "",
    batch_size: int = BATCH,
) -> Tensor:
    """float32 (n, D) on the CPU for the images in `rows` int64 (n,), with running norm statistics; the mode is left as it was.

    The network comes to lie on the run's device, channels last. A `title` asks for a progress bar: not within another one.
    """
    network.to(hardware.device).to(memory_format=torch.channels_last)
    parts, silent = [], nullcontext[Callable[[int], None]](lambda _: None)
    with in_evaluation(network), hardware.autocast(), progress(title, len(rows)) if title else silent as advance:
        for part in images.batches(rows, batch_size):
            parts.append(network(prepare(part, preprocessing, hardware.device)).float().cpu())
            advance(len(part))
    return torch.cat(parts)


class FeatureStore:
    """What networks said of the images of a run, in files by name under `folder`, made at most once.

    A name says what a file holds; that it is just what is asked for, its fingerprint says. `elsewhere` are the folders of runs that may
    have it already.
    """

    def __init__(self, folder: Path, images: Images, hardware: Hardware, batch_size: int = BATCH, elsewhere: Iterable[Path] = ()) -> None:
        self.places = [folder, *elsewhere]
        self.images, self.hardware, self.batch_size = images, hardware, batch_size

    @classmethod
    def of(cls, session: Session) -> "FeatureStore":
        """That of a run; the other runs of a sweep may have filled theirs, and so may the run whose backbone this one starts from."""
        init = session.experiment.finetune.init
        others = [*session.request.siblings, *([] if init in ("pretrain", "random") else [Path(init).parent.parent])]
        return cls(
            session.folder.features,
            session.images,
            session.hardware,
            session.experiment.evaluate.batch_size,
            [run / "features" for run in others],
        )

    def features(self, name: str, network: nn.Module, preprocessing: Preprocessing, rows: np.ndarray) -> Tensor:
        """float32 (n, D) for the images in `rows` int64 (n,).

        A frozen backbone's features are thus extracted once, whatever classifiers stand on it.
        """
        identity = (weights_fingerprint(network), self.images.fingerprint, _digest(rows), repr(preprocessing), self.hardware.precision)

        def make() -> dict[str, Tensor]:
            title = f"features ({name.replace('_', ' ')})"
            return {"features": outputs(network, self.images, rows, preprocessing, self.hardware, title, self.batch_size)}

        return self._kept(name, repr(identity), make)["features"]

    def of_split(self, split: str, name: str, network: nn.Module, preprocessing: Preprocessing) -> Tensor:
        """The same for the `train` or `test` images, in order."""
        return self.features(f"{name}_{split}", network, preprocessing, self.images.rows(split))

    def of_all(self, name: str, network: nn.Module, preprocessing: Preprocessing) -> Tensor:
        """The same for all images, each split from a file of its own: stage two asks for training images alone."""
        parts = {split: self.of_split(split, name, network, preprocessing) for split in ("train", "test") if len(self.images.rows(split))}
        found = torch.empty(len(self.images.pixels), *next(iter(parts.values())).shape[1:])
        for split, part in parts.items():
            found[self.images.rows(split)] = part
        return found

    def neighbours(self, name: str, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`nearest_others` of `features` (N, D)."""

        def make() -> dict[str, Tensor]:
            similarities, rows = nearest_others(features, k)
            return {"similarities": torch.from_numpy(similarities), "rows": torch.from_numpy(rows)}

        identity = _digest(features), features.shape, k
        kept = self._kept(f"{name}_neighbours", repr(identity), make)
        return kept["similarities"].numpy(), kept["rows"].numpy()

    def _kept(self, name: str, identity: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        for path in (path for place in self.places for path in sorted(place.glob("*.safetensors"))):
            kept = _read(path, fingerprint)
            if kept is not None:
                return kept
        made = make()
        if is_rank_zero():
            self.places[0].mkdir(exist_ok=True)
            contiguous = {key: value.contiguous() for key, value in made.items()}
            write_atomically(self.places[0] / f"{name}.safetensors", save(contiguous, metadata={"fingerprint": fingerprint}))
        return made


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _read(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """What a file holds, or None where it is something of another fingerprint, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError:
        return None


def weights_fingerprint(network: nn.Module) -> str:
    """Of all parameters and buffers; equal weights give equal features, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
