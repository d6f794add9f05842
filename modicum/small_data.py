"""What stage one's defaults are on small data sets, where the papers' constants, made for a million images, leave a network untaught.

Found by measuring on digits and Fashion-MNIST: docs/results.md. Queue, temperature and the teacher's momentum the methods decide.
"""

from collections.abc import Mapping
from typing import Any

from modicum.optim import Recipe
from modicum.settings import AUTO
from modicum.views.recipes import Recipe as View

SMALL_DATA = 50_000  # training images, below which these hold
BATCH, USUAL_BATCH = 128, 256  # many steps of few images beat few of many; the other is for large sets
OPTIMIZER = Recipe("adamw", lr=0.002, weight_decay=0.01, batch=BATCH, scaling="sqrt", warmup=0.03)
CROP = 0.4  # share of the area that a view keeps at least: less of a small image shows cloth, or a stroke
WHY, WHY_USUAL = f"for fewer than {SMALL_DATA:,} images", f"for {SMALL_DATA:,} images or more"


def is_small(num_images: int) -> bool:
    """Whether these defaults hold for that many training images."""
    return num_images < SMALL_DATA


def takes_ours(optimizer: Mapping[str, Any]) -> bool:
    """Whether what was asked for leaves the `optimizer` to us, and is no setting of the paper's."""
    return optimizer["name"] == OPTIMIZER.name or all(optimizer[key] == AUTO for key in ("name", "lr", "momentum", "nesterov"))


def milder(policy: dict[str, Any], view: View) -> dict[str, Any]:
    """A method's own `policy`, which makes `view`: full-sized crops keep `CROP` of the area or more."""
    if view.size or view.crop_scale is None or view.crop_scale[0] >= CROP:
        return policy
    return {**policy, "crop_scale": (CROP, view.crop_scale[1])}
