"""Pixels in the place of features: what every backbone has to beat."""

import numpy as np
import torch
from torch import nn

from modicum.data.image_files import Pixels

LARGEST_RAW = 64  # pixels a side above which raw pixels are pooled
POOLED = 32


def raw_pixels(pixels: Pixels) -> tuple[np.ndarray, str]:
    """Pixels as features float32 (N, D) in 0..1, and the words for it; large images are averaged down to 32 pixels a side."""
    side = pixels.shape[-1]
    pooled = side > LARGEST_RAW
    pool = nn.AdaptiveAvgPool2d(POOLED) if pooled else nn.Identity()
    parts = [pool(part.float().div_(255)).flatten(1) for part in pixels.split(1024)]
    note = f"Raw pixels were averaged down from {side} to {POOLED} pixels a side." if pooled else ""
    return torch.cat(parts).numpy(), note
