"""What a network says of plain images: for the validation split, and for the features that labels are spread over."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from modicum.record import progress
from modicum.resolve import view_arguments
from modicum.session import Session
from modicum.views.policies import build_policy

BATCH = 512


@torch.no_grad()
def outputs(session: Session, network: nn.Module, rows: Tensor, title: str = "") -> Tensor:
    """float32 (N, D) on the CPU for the images in `rows` int64 (N,), with running norm statistics; the mode is left as it was.

    A `title` asks for a progress bar: not within another one.
    """
    policy = build_policy({"name": "none"}, **view_arguments(session.experiment.data))
    mode = network.training
    network.eval()
    parts, silent = [], nullcontext[Callable[[int], None]](lambda _: None)
    with session.hardware.autocast(), progress(title, len(rows)) if title else silent as advance:
        for part in rows.split(BATCH):
            parts.append(network(policy(session.images.pixels[part].to(session.hardware.device), {})).float().cpu())
            advance(len(part))
    network.train(mode)
    return torch.cat(parts)
