"""How fast views are made, on one thread: every policy of ours, and MoCo v2 as others make it. `python -m benchmarks.views`

Claim: at least 40,000 MoCo v2 views a second at 32 px RGB, without blur (off at this size), each image with its own draw, order of
colour operations included, exact to torchvision's functionals.
Measured: 43,000 (best round 47,500), 21 times torchvision image by image and 3.6 times torchvision v2 with one draw for the whole batch,
which is less work; 143,000 at 28 px grey; 274 at 224 px with blur, 2.5 times and 1.7 times. Median of 25 rounds, one core of an AMD EPYC
(AVX-512), shared and busy with other work, torch 2.14.1, torchvision 0.29.1, 22 November 2026.

Rounds are interleaved, so that noise falls on all alike. On one thread the clock is the processor time of this process, so that others
that take the core in between do not count (that they share its caches does). Drawing the random numbers is included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torchvision.transforms import v2

from modicum.randomness import generator
from modicum.views import build_policy
from modicum.views.recipes import PAPERS

SETTINGS = ((32, 3, 512), (28, 1, 512), (224, 3, 16))  # side, channels, batch
COMPARED = "moco_v2"


Candidates = dict[str, tuple[int, Callable[[], object]]]  # name -> (views made, function)


def ours(images: torch.Tensor) -> Candidates:
    count, channels, side, _ = images.shape
    keywords: dict[str, Any] = {
        "image_size": side,
        "channels": channels,
        "mirror": True,
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
    }
    policies = [build_policy({"name": name}, **keywords) for name in PAPERS]
    return {policy.name: (count, partial(lambda p: p(images, p.draw(generator(0), count)), policy)) for policy in policies}


def others(images: torch.Tensor) -> Candidates:
    """MoCo v2 by other libraries. What does not suit the images is left out, as in ours."""
    side, channels = images.shape[-1], images.shape[1]
    colour = channels == 3
    jitter = v2.ColorJitter(0.4, 0.4, 0.4, 0.1) if colour else v2.ColorJitter(0.4, 0.4)
    before = [
        v2.RandomResizedCrop(side, (0.2, 1), antialias=True),
        v2.RandomApply([jitter], 0.8),
        *([v2.RandomGrayscale(0.2)] if colour else []),
    ]
    taps = side // 20 * 2 + 1
    blur = [v2.RandomApply([v2.GaussianBlur(taps, (0.1, 2.0))], 0.5)] if side > 32 else []
    after = [*blur, v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * channels, (0.25,) * channels)]
    single = v2.Compose([*before, *after[:-2], v2.ToImage(), *after[-2:]])
    batch = v2.Compose([*before, *after])
    few = [v2.functional.to_pil_image(image) for image in images[:64]]
    found: Candidates = {
        "torchvision, image by image (PIL)": (len(few), lambda: torch.stack([single(image) for image in few])),
        "torchvision v2, one draw a batch": (len(images), lambda: batch(images)),
    }
    try:
        import kornia.augmentation as K  # type: ignore[import-not-found]  # an extra: [bench]
    except ImportError:
        return found
    steps = [
        K.RandomResizedCrop((side, side), (0.2, 1)),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        *([K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=0.5)] if side > 32 else []),
        K.RandomHorizontalFlip(),
        K.Normalize((0.5,) * channels, (0.25,) * channels),
    ]
    if colour:
        kornia = K.AugmentationSequential(*steps, data_keys=["input"])
        found["kornia"] = (len(images), lambda: kornia(images.float() / 255))
    return found


def measure(candidates: Candidates, rounds: int, clock: Callable[[], float]) -> dict[str, tuple[float, float]]:
    """Views a second of each: the median round, the best round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, (count, function) in candidates.items():
            start = clock()
            function()
            if number:  # the first round warms up
                seconds[name].append((clock() - start) / count)
    return {name: (1 / statistics.median(values), 1 / min(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), median (and best) of {arguments.rounds} interleaved rounds")
    for side, channels, batch in SETTINGS:
        images = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)
        speed = measure(ours(images) | others(images), arguments.rounds, time.process_time if arguments.threads == 1 else time.perf_counter)
        print(f"\n{side} px, {channels} channel(s), batches of {batch}")
        for name, (median, best) in speed.items():
            ratio = "" if name in PAPERS else f"   {COMPARED} here is {speed[COMPARED][0] / median:.1f} times as fast"
            print(f"  {name:36s}{median:10,.0f} ({best:9,.0f}) views/s{ratio}")


if __name__ == "__main__":
    main()
