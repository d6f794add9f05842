"""The endless order of images, and the batch that came before one."""

import pytest
import torch

from modicum.data.batches import positions
from modicum.data.stream import Stream
from modicum.randomness import generator
from modicum.views.policies import build_policy


@pytest.mark.parametrize("size", [1, 7, 40])
@pytest.mark.parametrize("count", [1, 6, 7, 64])
def test_any_stretch_equals_the_concatenation_of_permutations(size, count):
    whole = torch.cat([torch.randperm(size, generator=generator(3, "order", number)) for number in range(300 // size + 2)])
    for start in (0, 1, size - 1, size, 3 * size + 2, 200):
        assert torch.equal(positions(size, start, count, 3, "order"), whole[start : start + count])


def test_every_image_is_seen_equally_often():
    seen = torch.cat([positions(10, step * 4, 4, "a") for step in range(25)])
    assert torch.equal(seen.bincount(), torch.full((10,), 10))
    assert torch.equal(positions(10, 0, 73, "a").bincount().clamp(7, 8), positions(10, 0, 73, "a").bincount())


def test_keys_and_permutations_differ():
    first = positions(100, 0, 100, 0, "order")
    assert not torch.equal(first, positions(100, 0, 100, 1, "order"))
    assert not torch.equal(first, positions(100, 100, 100, 0, "order"))
    assert torch.equal(first, positions(100, 0, 100, 0, "order"))


def test_what_is_returned_may_be_changed():
    positions(5, 0, 5, "a").zero_()
    assert positions(5, 0, 5, "a").sum() == 10


def test_nothing_asked_is_nothing_given():
    assert positions(5, 3, 0, "a").shape == (0,)


def test_a_sample_can_be_asked_for_the_one_before():
    """Without state: the same images, and the same draws for their views. The first one has itself before it."""
    pixels = torch.randint(0, 256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weak = build_policy({"name": "weak"}, image_size=8, channels=1, mirror=False, mean=[0.5], std=[0.25])
    stream = Stream(pixels, torch.arange(20), torch.arange(20), [weak], 6, torch.device("cpu"), (0, "order"))
    earlier, later = stream.sample(3), stream.sample(4)
    assert torch.equal(later.previous().rows, earlier.rows)
    assert torch.equal(later.previous().view(0), earlier.view(0))
    assert not torch.equal(later.view(0), earlier.view(0))
    assert torch.equal(stream.sample(0).previous().view(0), stream.sample(0).view(0))
