"""One image file -> one uint8 array, whatever its format: upright, opaque, grey or colour, square."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from modicum.data.listing import SUFFIXES

# No others are tried, whatever a file's name: some of Pillow's readers start a program (PostScript) or fail in ways of their own (DDS).
FORMATS = sorted({Image.registered_extensions()[suffix] for suffix in SUFFIXES})
INTERPOLATION = Image.Resampling.BILINEAR  # antialiased where it shrinks
GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
# What Pillow raises on damaged files, over all its formats; anything else is a mistake of ours and shows its traceback.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def survey(path: Path) -> tuple[int, bool]:
    """Shorter side in pixels and whether the image is grey, from its header alone. Raises one of UNREADABLE."""
    with Image.open(path, formats=FORMATS) as image:
        return min(image.size), image.mode in GREY_MODES


def decode(path: Path, image_size: int, channels: int) -> np.ndarray:
    """uint8 (channels, image_size, image_size): the shorter side fits, the longer is cropped about its centre.

    The camera's orientation is respected, transparency lies over white, 16-bit grey keeps its upper 8 bits.
    Raises one of UNREADABLE.
    """
    with Image.open(path, formats=FORMATS) as image:
        # JPEG can be decoded at a half, a quarter or an eighth; twice the side is left to the antialiased resize.
        image.draft(None, (2 * image_size, 2 * image_size))
        ImageOps.exif_transpose(image, in_place=True)
        flat = _opaque(image).convert("L" if channels == 1 else "RGB")
    width, height = flat.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = flat.resize((image_size, image_size), INTERPOLATION, box=(left, top, left + side, top + side))
    pixels = np.asarray(square)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255 to white
        return Image.fromarray(((np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white
    return image


def reason(error: BaseException) -> str:
    """Why a file is unreadable, in a few words on one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    return " ".join(str(error).split()) or type(error).__name__
