"""What a policy does, in numbers: one frozen record, and the papers' values for it.

`size` aside, a setting at zero (or none) switches its step off. The steps run in the order of the record.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from modicum.config import did_you_mean
from modicum.errors import InputError
from modicum.settings import Fraction, Positive, Settings
from modicum.views.randaugment import OPERATIONS


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the lower bound comes first")
    return pair


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}{did_you_mean(name, OPERATIONS)}".rstrip("."))
    return names


Strength = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Recipe(Settings):
    size: Annotated[int, Field(ge=4, le=1024)] | None = Field(None, description="side of the view in pixels, for crops; none: the image's")
    crop_scale: Annotated[tuple[Share, Share], AfterValidator(_ordered)] | None = Field(
        None, description="share of the area that a crop keeps"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], AfterValidator(_ordered)] = Field(
        (3 / 4, 4 / 3), description="width over height of a crop"
    )
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(0, description="largest move, in sides, filled by reflection; instead of a crop")
    flip_probability: Fraction = Field(0, description="left to right")
    jitter_probability: Fraction = Field(0, description="of the four colour operations below, in random order")
    brightness: Strength = Field(0, description="factor drawn from 1 - x .. 1 + x")
    contrast: Strength = Field(0, description="the same, towards the image's mean grey")
    saturation: Strength = Field(0, description="the same, towards the pixel's grey")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0, description="turn drawn from -x .. x of the colour circle")
    gray_probability: Fraction = Field(0, description="of dropping colour")
    gray_first: bool = Field(False, description="whether colour is dropped before the jitter")
    num_operations: Annotated[int, Field(ge=0, le=8)] = Field(0, description="RandAugment: operations drawn an image")
    operations: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_known)] = Field(
        tuple(name for name in OPERATIONS if name != "zoom"), description="RandAugment: what is drawn from, with equal chance"
    )
    enhance: Annotated[tuple[Strength, Strength], AfterValidator(_ordered)] = Field(
        (0.05, 0.95), description="RandAugment: factor of brightness, contrast, color and sharpness"
    )
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(30, description="RandAugment: largest turn in degrees")
    shear: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="RandAugment: largest shear as a ratio")
    translate: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="RandAugment: largest move in sides")
    zoom: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="RandAugment: enlargement drawn from 1 - x .. 1 + x")
    blur_probability: Fraction = Field(0, description="of a Gaussian blur with a kernel of a tenth of the side")
    blur_sigma: Annotated[tuple[Positive, Positive], AfterValidator(_ordered)] = Field((0.1, 2.0), description="of the blur, in pixels")
    solarize_probability: Fraction = Field(0, description="of inverting what is brighter than half")
    cutout: Fraction = Field(0, description="side of a square set to the mean colour, in sides of the view, placed anywhere")

    @property
    def jitters(self) -> bool:
        return bool(self.jitter_probability and (self.brightness or self.contrast or self.saturation or self.hue))

    def blur_taps(self, size: int) -> int:
        """Width of the blur's kernel for views of `size` pixels: a tenth of the side, odd."""
        return max(3, round(size / 10) // 2 * 2 + 1)


_JITTER = {"jitter_probability": 0.8, "brightness": 0.4, "contrast": 0.4}
_MOCO_V2 = {
    "crop_scale": (0.2, 1),
    "flip_probability": 0.5,
    **_JITTER,
    "saturation": 0.4,
    "hue": 0.1,
    "gray_probability": 0.2,
    "blur_probability": 0.5,
}
_BYOL = {**_MOCO_V2, "crop_scale": (0.08, 1), "saturation": 0.2, "blur_probability": 1.0}
_SIMCLR = {**_MOCO_V2, "crop_scale": (0.08, 1), "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
_SOLARIZED = {"blur_probability": 0.1, "solarize_probability": 0.2}
_WEAK = {"shift": 0.125, "flip_probability": 0.5}

# name -> settings of the paper, for colour images of 224 px
PAPERS: dict[str, dict[str, Any]] = {
    "none": {},
    "weak": _WEAK,  # FixMatch, arXiv 2001.07685
    "moco_v1": {  # arXiv 1911.05722
        "crop_scale": (0.2, 1),
        "flip_probability": 0.5,
        "jitter_probability": 1.0,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.4,
        "gray_probability": 0.2,
        "gray_first": True,
    },
    "moco_v2": _MOCO_V2,  # arXiv 2003.04297
    "simclr": _SIMCLR,  # arXiv 2002.05709
    "byol_a": _BYOL,  # arXiv 2006.07733, the two views differ
    "byol_b": {**_BYOL, **_SOLARIZED},
    "swav": {**_SIMCLR, "crop_scale": (0.14, 1)},  # arXiv 2006.09882, with smaller crops beside
    "swav_local": {**_SIMCLR, "crop_scale": (0.05, 0.14), "size": 96},
    "dino_a": {**_BYOL, "crop_scale": (0.4, 1)},  # arXiv 2104.14294, the same
    "dino_b": {**_BYOL, "crop_scale": (0.4, 1), **_SOLARIZED},
    "dino_local": {**_BYOL, "crop_scale": (0.05, 0.4), "size": 96, "blur_probability": 0.5},
    "strong": {**_WEAK, "num_operations": 2, "cutout": 0.5},  # FixMatch
}

SMALL, TINY = 64, 32  # pixels


def recipe_of(name: str, image_size: int, channels: int, mirror: bool) -> dict[str, Any]:
    """The paper's settings of `name`, adapted to the data:

    - no flips where a mirrored image is another thing, no hue, saturation or grey on one channel;
    - local crops have the paper's share of the side, 96 of 224 px, in multiples of 4 and at least 8;
    - up to 64 px crops keep a fifth of the area or more (8 % would be 9 of 32 px), local ones a fifth to a half, and SimCLR's jitter has
      half its strength (as its paper does on 32 px); up to 32 px there is no blur (as there);
    - `strong` on one channel up to 64 px: the drawing is the image, so it must stay readable and in the frame. Gentle warps with zoom,
      contrast-like operations that keep 30 % or more, a cutout of 30 % of the side; nothing that inverts or cuts brightness into levels.
    Raises InputError for an unknown name.
    """
    if name not in PAPERS:
        raise InputError(f"Unknown view policy {name!r}{did_you_mean(name, PAPERS)}")
    recipe = dict(PAPERS[name])
    if "size" in recipe:
        recipe["size"] = min(image_size, max(8, 4 * round(image_size * recipe["size"] / 224 / 4)))
    if image_size <= SMALL and "crop_scale" in recipe:
        recipe["crop_scale"] = (0.2, 0.5) if "size" in recipe else (max(0.2, recipe["crop_scale"][0]), 1)
        if name.startswith(("simclr", "swav")):
            recipe |= {key: _MOCO_V2[key] for key in ("brightness", "contrast", "saturation", "hue")}
    if image_size <= TINY:
        recipe["blur_probability"] = 0
    if not mirror:
        recipe["flip_probability"] = 0
    if channels == 1:
        recipe |= {"saturation": 0, "hue": 0, "gray_probability": 0}
        recipe["operations"] = tuple(operation for operation in Recipe().operations if operation != "color")
        if name == "strong" and image_size <= SMALL:
            left_out = ("equalize", "posterize", "solarize")
            recipe["operations"] = (*(operation for operation in recipe["operations"] if operation not in left_out), "zoom")
            recipe |= {"enhance": (0.3, 0.95), "rotate": 25, "shear": 0.25, "translate": 0.125, "cutout": 0.3}
    return recipe
