"""Many views of an image, of several sizes."""

from collections.abc import Callable
from itertools import groupby

import torch
from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def by_size(network: Callable[[Tensor], Tensor], views: list[Tensor]) -> list[Tensor]:
    """`network` of each of the views (N, C, S, S), in one pass for neighbours of the same size."""
    outputs: list[Tensor] = []
    for _, same in groupby(views, key=lambda view: view.shape[-1]):
        together = list(same)
        outputs += network(torch.cat(together)).chunk(len(together))
    return outputs


def take_all_sizes(backbone: nn.Module) -> None:
    """Lets a vision transformer take smaller views than its images: it interpolates its position embedding to their patches."""
    for module in backbone.modules():
        if isinstance(module, VisionTransformer):
            module.dynamic_img_size = True  # type: ignore[misc]  # final for TorchScript alone
            module.patch_embed.strict_img_size = False
            module.patch_embed.flatten = False
            module.patch_embed.output_fmt = Format.NHWC
