"""Every image through every frozen network once; all figures of the stage are computed from the features kept here."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from modicum.checkpoint import Preprocessing
from modicum.data.image_files import ImageFiles, Pixels
from modicum.files import write_atomically
from modicum.hardware import Hardware
from modicum.record import progress

LARGEST_RAW = 64  # pixels a side above which raw pixels are pooled
POOLED = 32


def prepare(pixels: torch.Tensor, preprocessing: Preprocessing, device: torch.device) -> torch.Tensor:
    """uint8 (B, C, S, S) -> normalised float32 on `device`, channels last."""
    images = pixels.to(device).float().div_(255)
    shape = (1, -1, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=device).view(shape)
    std = torch.tensor(preprocessing.std, device=device).view(shape)
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def extract(
    network: nn.Module, pixels: Pixels, preprocessing: Preprocessing, hardware: Hardware, batch_size: int, description: str
) -> torch.Tensor:
    """Outputs float32 (N, D) on the CPU of `network`, in evaluation mode, for `pixels` uint8 (N, C, S, S)."""
    network = network.to(hardware.device).to(memory_format=torch.channels_last).eval()
    outputs = []
    with progress(description, len(pixels)) as advance:
        for part in pixels.split(batch_size):
            batch = prepare(part, preprocessing, hardware.device)
            with hardware.autocast():
                output = network(batch)
            outputs.append(output.float().cpu())
            advance(len(batch))
    return torch.cat(outputs)


@torch.inference_mode()
def apply_head(head: nn.Module, features: torch.Tensor, hardware: Hardware) -> np.ndarray:
    """Logits float32 (N, C), from features (N, D): in fp32, since the head costs nothing."""
    return head.to(hardware.device).eval()(features.to(hardware.device)).float().cpu().numpy()


def raw_pixels(pixels: Pixels) -> tuple[np.ndarray, str]:
    """Pixels as features float32 (N, D) in 0..1, and the words for it; large images are averaged down to 32 pixels a side."""
    side = pixels.shape[-1]
    pooled = side > LARGEST_RAW
    pool = nn.AdaptiveAvgPool2d(POOLED) if pooled else nn.Identity()
    parts = [pool(part.float().div_(255)).flatten(1) for part in pixels.split(1024)]
    note = f"Raw pixels were averaged down from {side} to {POOLED} pixels a side." if pooled else ""
    return torch.cat(parts).numpy(), note


def pixels_fingerprint(pixels: Pixels) -> str:
    if isinstance(pixels, ImageFiles):
        return pixels.fingerprint
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    for part in pixels.split(4096):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """Of all parameters and buffers; equal weights give equal features, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_features(path: Path, fingerprint: str) -> torch.Tensor | None:
    """What `write_features` left, or None if nothing, or something of another fingerprint, is there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features") if (file.metadata() or {}).get("fingerprint") == fingerprint else None


def write_features(path: Path, features: torch.Tensor, fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"features": features.contiguous()}, metadata={"fingerprint": fingerprint}))


class FeatureStore:
    """Features by name under `folder`, computed at most once per (weights, images, preprocessing, precision).

    `elsewhere` are the folders of runs that may have them already.
    """

    def __init__(self, folder: Path, hardware: Hardware, batch_size: int, elsewhere: Iterable[Path] = ()) -> None:
        self.places = [folder, *elsewhere]
        self.hardware, self.batch_size = hardware, batch_size
        self._pixels: dict[int, tuple[Pixels, str]] = {}  # the tensor too: freed, its id would go to another

    def features(self, name: str, network: nn.Module, preprocessing: Preprocessing, pixels: Pixels) -> torch.Tensor:
        """float32 (N, D) for `pixels` uint8 (N, C, S, S), from a file if one holds just these, else made and kept as `name`.safetensors.

        A frozen backbone's features are thus extracted once, whatever classifiers stand on it.
        """
        if id(pixels) not in self._pixels:
            self._pixels[id(pixels)] = pixels, pixels_fingerprint(pixels)
        identity = (weights_fingerprint(network), self._pixels[id(pixels)][1], repr(preprocessing), self.hardware.precision)
        fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        for path in (path for place in self.places for path in sorted(place.glob("*.safetensors"))):
            kept = read_features(path, fingerprint)
            if kept is not None:
                return kept
        made = extract(network, pixels, preprocessing, self.hardware, self.batch_size, f"features ({name})")
        write_features(self.places[0] / f"{name}.safetensors", made, fingerprint)
        return made
