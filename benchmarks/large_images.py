"""A folder of photographs becomes pixels: kept or read anew, beside a DataLoader over ImageFolder. `python -m benchmarks large_images`

Measured: images a second of 500 JPEGs of 500 x 375 px, made for the purpose, at 224 px RGB. `first time`: ours builds the memory-mapped
cache of a folder, writes it to the disk and hashes each image. `read again` and `read anew` are every later epoch of ours, from the cache
and without one (`data.cache=none`). The peer is torchvision's ImageFolder with a DataLoader of a worker a core (resize, centre crop,
bytes); it does the same work in every epoch.

`training` is what is left of that: two views, forward and backward of a small network, batch after batch, with the images from the cache
(ours), decoded by workers ahead of the step, and decoded within the step by as many threads.
"""

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.pairs import Row, Work, compared, device_clock, take_turns
from benchmarks.pictures import WORKERS
from modicum.data.image_files import Pixels
from modicum.data.images import Images
from modicum.data.listing import walk
from modicum.data.pixel_cache import open_pixels
from modicum.data.stream import Stream
from modicum.hardware import choose_hardware
from modicum.networks import create_backbone
from modicum.settings import BackboneSettings, DataSettings, Experiment
from modicum.views.policies import build_policy

SIDE, BATCH = 224, 64
PEER = "torchvision ImageFolder, DataLoader"
AHEAD, WITHIN = "read anew, ahead of the step", "read anew, within the step"
KEPT = DataSettings(image_size=SIDE, channels=3, cache="disk")
ANEW = KEPT.model_copy(update={"cache": "none"})


def run(quick: bool) -> Iterator[Row]:
    number, rounds = (12, 1) if quick else (500, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(folder / "images", number)
        tree, place = walk(folder / "images"), count()
        crop = v2.Compose([v2.Resize(SIDE), v2.CenterCrop(SIDE), v2.PILToTensor()])
        loader = DataLoader(ImageFolder(folder / "images", crop), batch_size=BATCH, shuffle=True, num_workers=WORKERS)

        def build() -> Pixels:
            pixels, _ = open_pixels(tree, KEPT, [folder / f"cache{next(place)}"])
            return pixels

        def decode() -> None:
            assert sum(len(images) for images, _ in loader) == number

        kept, (anew, _) = build(), open_pixels(tree, ANEW, [folder / "cache0"])

        def read_again() -> None:
            for rows in np.array_split(np.random.default_rng(0).permutation(number), -(-number // BATCH)):
                kept[torch.from_numpy(rows)]

        def read_anew() -> None:
            assert sum(len(images) for images in anew.split(BATCH)) == number

        clock, amounts = device_clock(torch.device("cpu")), {"ours": number, PEER: number}
        setting = f"{number} JPEGs to {SIDE} px"
        for title, ours in (("first time", build), ("read again", read_again), ("read anew", read_anew)):
            seconds = take_turns({"ours": ours, PEER: decode}, rounds, clock)
            yield from compared("large_images", f"{setting}, {title}", seconds, unit="images/s", amounts=amounts)

        steps, batch = (1, 2) if quick else (6, BATCH)
        works = {"ours": train(kept, steps, batch), AHEAD: train(anew, steps, batch), WITHIN: train(anew, steps, batch, ahead=False)}
        seconds = take_turns(works, rounds, device_clock(choose_hardware(Experiment()).device))
        amounts = dict.fromkeys(works, steps * batch)
        yield from compared("large_images", f"{setting}, training", seconds, unit="images/s", amounts=amounts)


def train(pixels: Pixels, steps: int, batch: int, *, ahead: bool = True) -> Work:
    """Some steps on two views of each image. The stream is a new one each time, so that nothing is decoded while others take their turn."""
    names = [str(number) for number in range(len(pixels))]
    images = Images("photographs", pixels, pd.DataFrame({"id": names, "path": names, "label": -1, "split": "train"}), (), mirror=True)
    policy = build_policy({"name": "moco_v2"}, image_size=SIDE, channels=3, mirror=True, mean=(0.5,) * 3, std=(0.25,) * 3)
    hardware = choose_hardware(Experiment())
    backbone = create_backbone(BackboneSettings(name="resnet10_tiny"), 3, SIDE, seed=0)
    backbone.to(hardware.device).to(memory_format=torch.channels_last)

    def work() -> None:
        stream = Stream.of(images, images.rows("train"), [policy, policy], batch, hardware.device, 0, "benchmark")
        for step in range(steps):
            sample = stream.sample(step)
            if not ahead:
                sample.images = stream.read(sample.chosen)
            with hardware.autocast():
                loss = sum(backbone(sample.view(number)).float().square().mean() for number in range(2))
            loss.backward()

    return work


def make_photographs(root: Path, number: int) -> None:
    """JPEGs of smooth colour with grain, in ten folders: about 80 kB each, as photographs of that size have."""
    random = np.random.default_rng(0)
    for index in range(number):
        path = root / f"class{index % 10}" / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        blobs = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        grain = random.normal(0, 12, (375, 500, 1))
        Image.fromarray((np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
