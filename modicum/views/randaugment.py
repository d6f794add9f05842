"""RandAugment as FixMatch uses it (arXiv 2001.07685, appendix): operations drawn per image, each with its own strength.

Departures: warps interpolate bilinearly (PIL: nearest) and shear about the centre (PIL: about the corner); pixels are not rounded to
eight bits between operations.
"""

import torch
from torch import Tensor

WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y", "zoom")
BLENDS = ("brightness", "contrast", "color")  # in the order of batched.colour.BRIGHTNESS, CONTRAST, SATURATION
OPERATIONS = ("identity", "autocontrast", "equalize", "posterize", "solarize", "sharpness", *BLENDS, *WARPS)


def draw_amounts(operation: Tensor, limits: dict[str, float], enhance: tuple[float, float], generator: torch.Generator) -> Tensor:
    """One strength for each drawn operation (int64, any shape): float32 of the same shape.

    Warps are even in -limit..limit (rotate in degrees, shear and zoom as ratios, translate in image sides), the enhancing operations
    even in `enhance` (1 changes nothing), posterize keeps 16 to 256 levels, solarize starts at 0 to 1.
    """
    even = torch.rand(operation.shape, generator=generator)
    span = torch.zeros(len(OPERATIONS))
    lowest = torch.zeros(len(OPERATIONS))
    for position, name in enumerate(OPERATIONS):
        if name in WARPS:
            span[position], lowest[position] = 2 * limits[name], -limits[name]
        elif name in (*BLENDS, "sharpness"):
            span[position], lowest[position] = enhance[1] - enhance[0], enhance[0]
        elif name == "solarize":
            span[position] = 1
    amount = lowest[operation] + span[operation] * even
    bits = 4 + (even * 5).long().clamp_max(4)
    return torch.where(operation == OPERATIONS.index("posterize"), (1 << bits).float(), amount)


def warp_matrices(operation: Tensor, amount: Tensor) -> Tensor:
    """Output-to-input maps (B, 2, 3), centre 0 and edges at -1 and 1, of the warps among the operations, on the CPU.

    Positive amounts turn counter-clockwise, shear to the right and downwards, move right and down, enlarge.
    """
    theta = torch.eye(2, 3).repeat(len(operation), 1, 1)
    name = {warp: operation == OPERATIONS.index(warp) for warp in WARPS}
    angle = torch.deg2rad(amount)
    turned = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    theta[:, :, :2] = torch.where(name["rotate"][:, None, None], turned, theta[:, :, :2])
    theta[:, 0, 1] -= name["shear_x"] * amount
    theta[:, 1, 0] -= name["shear_y"] * amount
    theta[:, 0, 2] -= name["translate_x"] * 2 * amount  # the grid is two units wide
    theta[:, 1, 2] -= name["translate_y"] * 2 * amount
    theta[:, :, :2] /= torch.where(name["zoom"], 1 + amount, torch.ones_like(amount))[:, None, None]
    return theta
