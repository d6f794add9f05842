"""A folder of photographs becomes pixels: our cache beside a DataLoader over ImageFolder. `python -m benchmarks large_images`

Measured: images a second of decoding 500 JPEGs of 500 x 375 px, made for the purpose, to 224 px RGB. Ours builds the memory-mapped cache of
a folder, writes it to the disk and hashes each image; the peer goes once through torchvision's ImageFolder with a DataLoader of 2 workers
(resize, centre crop, bytes). Ours is done once for a data set, the peer's in every epoch: `read again` is the second epoch of both.
"""

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.pairs import Row, compared, device_clock, take_turns
from benchmarks.pictures import WORKERS
from modicum.data.listing import walk
from modicum.data.pixel_cache import cached_pixels

SIDE, BATCH = 224, 64
PEER = "torchvision ImageFolder, DataLoader"


def run(quick: bool) -> Iterator[Row]:
    number, rounds = (12, 1) if quick else (500, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder / "images", number)
        tree, place = walk(folder / "images"), count()
        crop = v2.Compose([v2.Resize(SIDE), v2.CenterCrop(SIDE), v2.PILToTensor()])
        loader = DataLoader(ImageFolder(folder / "images", crop), batch_size=BATCH, shuffle=True, num_workers=WORKERS)

        def build() -> np.ndarray:
            pixels, _ = cached_pixels(tree, SIDE, 3, [folder / f"cache{next(place)}"])
            return pixels

        def decode() -> None:
            assert sum(len(images) for images, _ in loader) == number

        pixels = build()

        def read_again() -> None:
            for rows in np.array_split(np.random.default_rng(0).permutation(number), -(-number // BATCH)):
                torch.from_numpy(pixels[rows])

        clock, amounts = device_clock(torch.device("cpu")), {"ours": number, PEER: number}
        setting = f"{number} JPEGs to {SIDE} px"
        seconds = take_turns({"ours": build, PEER: decode}, rounds, clock)
        yield from compared("large_images", f"{setting}, first time", seconds, unit="images/s", amounts=amounts)
        seconds = take_turns({"ours": read_again, PEER: decode}, rounds, clock)
        yield from compared("large_images", f"{setting}, read again", seconds, unit="images/s", amounts=amounts)


def make_photographs(root: Path, number: int) -> None:
    """JPEGs of smooth colour with grain, in ten folders: about 80 kB each, as photographs of that size have."""
    random = np.random.default_rng(0)
    for index in range(number):
        path = root / f"class{index % 10}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        grain = random.normal(0, 12, (375, 500, 1))
        Image.fromarray((np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
