"""The compiled views of a CPU against the batched ones, which tests/test_views.py holds to torchvision."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from modicum import compiled
from modicum.randomness import generator
from modicum.views import Policy, batched, fused
from modicum.views.fused import colour
from modicum.views.randaugment import OPERATIONS
from modicum.views.recipes import PAPERS
from tests.test_views import close, pictures, policy


def both(p: Policy, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a policy made in both ways, pixels in 0..1."""
    draws = p.draw(generator("both"), len(images))
    one, other = torch.empty((2, len(images), p.channels, p.size, p.size))
    for render, out in ((fused.render, one), (batched.render, other)):
        render(p.recipe, images, draws, torch.ones(p.channels), torch.zeros(p.channels), out)
    return one, other


def agree(one: torch.Tensor, other: torch.Tensor) -> None:
    """Up to pixels at the edge of a step, which fall to either side of it, as posterize and solarize have them."""
    far = (one - other).abs() > 2e-4  # as precise as positions in float32 are, at 224 px
    assert far.float().mean() < 1e-3


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (8, 3), (28, 1), (32, 3), (48, 3), (96, 1), (224, 3)])
def test_every_policy(name: str, side: int, channels: int) -> None:
    agree(*both(policy(name, side, channels), pictures(8 if side == 224 else 60, side, channels)))


WIDE: dict[str, Any] = {"rotate": 180, "shear": 1, "translate": 0.9, "zoom": 0.9, "enhance": (0, 3)}


@pytest.mark.parametrize(
    ("operation", "side", "channels"),
    [(name, *size) for name in OPERATIONS for size in ((8, 1), (16, 1), (32, 3), (45, 3)) if name != "color" or size[1] == 3],
)
def test_every_operation_of_randaugment(operation: str, side: int, channels: int) -> None:
    """Far beyond what a recipe asks for, and three in a row."""
    spec = {"name": "strong", "num_operations": 3, "operations": (operation,), "cutout": 0, **WIDE}
    agree(*both(policy(spec, side, channels), pictures(40, side, channels)))


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "moco_v2", "crop_scale": (0.01, 1), "crop_ratio": (0.2, 5), "size": 8},
        {"name": "moco_v2", "crop_scale": (0.01, 0.05)},
        {"name": "moco_v2", "blur_probability": 1, "blur_sigma": (0.05, 9)},
        {"name": "moco_v2", "brightness": 3, "contrast": 3, "saturation": 3, "hue": 0.5, "jitter_probability": 1},
        {"name": "moco_v2", "hue": 0, "gray_first": True, "solarize_probability": 0.5},
        {"name": "moco_v2", "crop_scale": None, "shift": 0.5, "cutout": 1},
        {"name": "none", "flip_probability": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [32, 41])
def test_edits_of_a_policy(spec: dict[str, Any], side: int) -> None:
    agree(*both(policy(spec, side), pictures(60, side)))


def test_hue_of_every_coarse_colour() -> None:
    """All 17^3 colours of a grid, pure, grey, black and white and ties among channels included, by 41 turns of the circle."""
    level = torch.linspace(0, 1, 17)
    colours = torch.cartesian_prod(level, level, level).t()[None].contiguous()
    for turn in torch.linspace(-0.5, 0.5, 41):
        x = colours.clone()
        factors = np.array([[1, 1, 1, turn]], np.float32)
        colour.jitter(x.numpy(), np.array([0]), np.array([[batched.colour.HUE]]), factors)
        close(x[..., None], TF.adjust_hue(colours[..., None], turn.item()))


@pytest.mark.parametrize("name", ["moco_v2", "strong"])
def test_threads_and_their_parts_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, images = policy(name), pictures(50)
    draws = p.draw(generator(0), 50)
    expected = p(images, draws)
    before = torch.get_num_threads()
    monkeypatch.setattr(fused, "SHARED_VALUES", 0)
    try:
        for threads in (1, 2, 3, 64):
            torch.set_num_threads(threads)
            assert torch.equal(p(images, draws), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(fused, "CACHED_VALUES", 1)
    assert torch.equal(p(images, draws), expected)


def test_an_error_in_a_thread_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SHARED_VALUES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(fused.colour, "normalise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy("none")(pictures(10), {})


def test_images_in_another_order_of_memory() -> None:
    p, images = policy("moco_v2"), pictures(10)
    draws = p.draw(generator(0), 10)
    assert torch.equal(p(images.contiguous(memory_format=torch.channels_last), draws), p(images, draws))


def test_no_images() -> None:
    p = policy("strong")
    assert p(pictures(2)[:0], p.draw(generator(0), 0)).shape == (0, 3, 32, 32)


def test_where_nothing_may_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled.njit

    def without_a_folder(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return whole(**options)

    monkeypatch.setattr(compiled, "njit", without_a_folder)
    assert compiled.compiled(_twice)(np.float32(2)) == 4


def _twice(value: np.float32) -> np.float32:
    return value + value


def test_bits_do_not_depend_on_where_images_lie_in_memory() -> None:
    """Compiled loops from one array to another choose between two codes by the arrays' addresses; both must add in one order."""
    strong = policy("strong", 28, 1)
    sizes, between = torch.Generator().manual_seed(0), []
    for seed in range(20):
        images = torch.randint(0, 256, (60, 1, 28, 28), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        draws = strong.draw(generator(seed, "view"), 60)
        views = strong(images, draws)
        for i in range(60):
            between = [torch.empty(int(size)) for size in torch.randint(100, 60_000, (6,), generator=sizes)][1::2]  # moves what comes next
            assert torch.equal(strong(images[i : i + 1], {key: value[i : i + 1] for key, value in draws.items()})[0], views[i])
    assert between
