"""How fast views are made: every policy of ours, and the same policy as others make it. `python -m benchmarks views`

Claim: each image with its own draw, order of colour operations included, exact to torchvision's functionals, at 6 times the speed of kornia
and 20 times that of torchvision image by image at 28 and 32 px; at 224 px no slower than any of them.

Who does less work has no bar, but is measured all the same: torchvision v2 on whole batches, which draws once for a batch, and kornia's
RandAugment, which draws its operations once for a batch. (So does kornia's jitter with its order; it keeps its bar.) Nor has `none`, which
draws nothing.

On a CPU one thread works, and the clock is the processor time of this process, so that others that take the core in between do not
count (that they share its caches does). Drawing the random numbers is included. What does not suit the images (blur up to 32 px, colour
on one channel) is left out for everyone. Peers' RandAugment has its library's own operations at magnitude 10.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.pairs import Row, Work, compared, device_clock, installed, take_turns
from modicum.hardware import choose_hardware
from modicum.randomness import generator
from modicum.settings import Experiment
from modicum.views import build_policy
from modicum.views.policies import Policy
from modicum.views.recipes import PAPERS

SETTINGS = ((32, 3, 512), (28, 1, 512), (224, 3, 16))  # side, channels, batch
FEW = 64  # images of a round of those that work image by image
SINGLE, BATCH, KORNIA, KORNIA_BATCH = "torchvision by image (PIL)", "torchvision v2, one draw", "kornia", "kornia, one draw"
SMALL_BARS = {SINGLE: 20.0, KORNIA: 6.0}
LARGE_BARS = {SINGLE: 1.0, KORNIA: 1.0}


def run(quick: bool) -> Iterator[Row]:
    device = choose_hardware(Experiment()).device
    clock = time.process_time if device.type == "cpu" else device_clock(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with_kornia = installed("kornia")
    for side, channels, batch in SETTINGS:
        images = torch.randint(0, 256, (8 if quick else batch, channels, side, side), dtype=torch.uint8)
        for name in PAPERS:
            policy = policy_of(name, side, channels)
            works, amounts = candidates(policy, images, device, with_kornia)
            seconds = take_turns(works, 1 if quick else 15, clock)
            bars = {} if name == "none" else LARGE_BARS if side > 32 else SMALL_BARS
            setting = f"{name}, {side} px{' grey' if channels == 1 else ''}"
            yield from compared("views", setting, seconds, unit="views/s", amounts=amounts, bars=bars)
    torch.set_num_threads(threads)


def policy_of(name: str, side: int, channels: int) -> Policy:
    grey = (0.5,) * channels
    return build_policy({"name": name}, image_size=side, channels=channels, mirror=True, mean=grey, std=grey)


def candidates(policy: Policy, images: Tensor, device: torch.device, with_kornia: bool) -> tuple[dict[str, Work], dict[str, float]]:
    """What makes views of the same images, ours first, and the number of views it makes a round."""
    count, there = len(images), images.to(device)
    before, after = torchvision_steps(policy)
    whole, single = v2.Compose([*before, *after]), v2.Compose([*before, v2.ToImage(), *after])
    few = [v2.functional.to_pil_image(image) for image in images[:FEW]]
    works: dict[str, Work] = {
        "ours": lambda: policy(there, policy.draw(generator(0), count)),
        SINGLE: lambda: torch.stack([single(image) for image in few]),
        BATCH: lambda: whole(there),
    }
    if with_kornia and (kornia := kornia_policy(policy)):
        works[KORNIA_BATCH if policy.recipe.num_operations else KORNIA] = lambda: kornia(there.float() / 255)
    return works, {name: len(few) if name == SINGLE else count for name in works}


def torchvision_steps(policy: Policy) -> tuple[list[Any], list[Any]]:
    """The policy's transforms on bytes, and those that follow on floats."""
    recipe, side, colour = policy.recipe, policy.size, policy.channels == 3
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, *((recipe.saturation, recipe.hue) if colour else ()))
    grey = [v2.RandomGrayscale(recipe.gray_probability)] if recipe.gray_probability else []
    shift = round(recipe.shift * side)
    before = [
        *([v2.RandomResizedCrop(side, recipe.crop_scale, recipe.crop_ratio, antialias=True)] if recipe.crop_scale else []),
        *([v2.RandomCrop(side, padding=shift, padding_mode="reflect")] if shift else []),
        *([v2.RandomHorizontalFlip(recipe.flip_probability)] if recipe.flip_probability else []),
        *(grey if recipe.gray_first else []),
        *([v2.RandomApply([jitter], recipe.jitter_probability)] if recipe.jitters else []),
        *([] if recipe.gray_first else grey),
        *([v2.RandAugment(recipe.num_operations, 10)] if recipe.num_operations else []),
        *([v2.RandomApply([v2.GaussianBlur(taps(side), recipe.blur_sigma)], recipe.blur_probability)] if recipe.blur_probability else []),
        *([v2.RandomSolarize(128, recipe.solarize_probability)] if recipe.solarize_probability else []),
    ]
    normal = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(policy.mean, policy.std)]
    square = (recipe.cutout**2,) * 2
    return before, [*normal, *([v2.RandomErasing(1.0, square, (1.0, 1.0))] if recipe.cutout else [])]


def kornia_policy(policy: Policy) -> Callable[[Tensor], Tensor] | None:
    """The policy by kornia, on floats; None where kornia has no such thing (RandAugment on one channel)."""
    import kornia.augmentation as K
    from kornia.augmentation.auto import RandAugment

    recipe, side, colour = policy.recipe, policy.size, policy.channels == 3
    if recipe.num_operations and not colour:
        return None
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    jitter: list[nn.Module] = [K.ColorJitter(*strengths, p=recipe.jitter_probability)]
    if not colour:
        around = [(1 - strength, 1 + strength) for strength in strengths[:2]]
        jitter = [
            kind(pair, p=recipe.jitter_probability) for kind, pair in zip((K.RandomBrightness, K.RandomContrast), around, strict=True)
        ]
    grey = [K.RandomGrayscale(p=recipe.gray_probability)] if recipe.gray_probability else []
    shift = round(recipe.shift * side)
    square = (recipe.cutout**2,) * 2
    steps = [
        *([K.RandomResizedCrop((side, side), recipe.crop_scale, recipe.crop_ratio)] if recipe.crop_scale else []),
        *([K.RandomCrop((side, side), padding=shift, padding_mode="reflect")] if shift else []),
        *([K.RandomHorizontalFlip(p=recipe.flip_probability)] if recipe.flip_probability else []),
        *(grey if recipe.gray_first else []),
        *(jitter if recipe.jitters else []),
        *([] if recipe.gray_first else grey),
        *([RandAugment(n=recipe.num_operations, m=10)] if recipe.num_operations else []),
        *([K.RandomGaussianBlur((taps(side),) * 2, recipe.blur_sigma, p=recipe.blur_probability)] if recipe.blur_probability else []),
        *([K.RandomSolarize(0.5, 0.0, p=recipe.solarize_probability)] if recipe.solarize_probability else []),
        K.Normalize(policy.mean, policy.std),
        *([K.RandomErasing(square, (1.0, 1.0), p=1.0)] if recipe.cutout else []),
    ]
    return partial(_in_order, steps)


@torch.no_grad()
def _in_order(steps: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    for step in steps:
        images = step(images)
    return images


def taps(side: int) -> int:
    """Width of a blur's kernel: a tenth of the side, odd."""
    return side // 20 * 2 + 1
