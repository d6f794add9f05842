"""What a network says of plain images: for the validation split, and for the features that labels are spread over."""

import torch
from torch import Tensor, nn

from modicum.resolve import view_arguments
from modicum.session import Session
from modicum.views.policies import build_policy

BATCH = 512


@torch.no_grad()
def outputs(session: Session, network: nn.Module, rows: Tensor) -> Tensor:
    """float32 (N, D) on the CPU for the images in `rows` int64 (N,), with running norm statistics; the mode is left as it was."""
    policy = build_policy({"name": "none"}, **view_arguments(session.experiment.data))
    mode = network.training
    network.eval()
    with session.hardware.autocast():
        parts = [network(policy(session.images.pixels[part].to(session.hardware.device), {})).float().cpu() for part in rows.split(BATCH)]
    network.train(mode)
    return torch.cat(parts)
