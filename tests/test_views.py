"""The batched views against torchvision's functionals on the same parameters, and what a policy promises."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from modicum.errors import InputError
from modicum.randomness import generator
from modicum.views import Policy, batched, build_policy
from modicum.views.batched import colour, geometry
from modicum.views.draws import draw_crops
from modicum.views.randaugment import OPERATIONS
from modicum.views.recipes import PAPERS, Recipe

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.25, 0.3)
SIZES = [(8, 1), (8, 3), (32, 1), (32, 3), (224, 3)]


def policy(spec: str | dict, image_size: int = 32, channels: int = 3, mirror: bool = True) -> Policy:
    spec = {"name": spec} if isinstance(spec, str) else spec
    return build_policy(spec, image_size=image_size, channels=channels, mirror=mirror, mean=MEAN[:channels], std=STD[:channels])


def pictures(count: int, image_size: int = 32, channels: int = 3) -> torch.Tensor:
    """Smooth colours with noise on top, dark and bright, one image constant: uint8 (count, C, S, S)."""
    random = generator("pictures", image_size, channels)
    coarse = torch.rand(count, channels, 4, 4, generator=random)
    smooth = torch.nn.functional.interpolate(coarse, size=image_size, mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=random)
    noisy[-1] = 0.5
    return (noisy.clamp(0, 1) * 255).round().to(torch.uint8)


def plain(policy: Policy, views: torch.Tensor) -> torch.Tensor:
    """Views without their normalisation: pixels in 0..1."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (policy.mean, policy.std))
    return views * std + mean


def one_by_one(function, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    return torch.stack([function(image, *(p.item() for p in row)) for image, *row in zip(x, *parameters, strict=True)])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.contiguous(), expected.contiguous(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("side", "channels"), SIZES)
@pytest.mark.parametrize(
    ("kind", "function"),
    [(colour.BRIGHTNESS, TF.adjust_brightness), (colour.CONTRAST, TF.adjust_contrast), (colour.SATURATION, TF.adjust_saturation)],
)
def test_blends_equal_torchvision(side, channels, kind, function):
    x = pictures(6, side, channels) / 255
    factor = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 3.0])
    maps = colour.blend_maps(torch.full((6,), kind), factor, channels)
    close(colour.blend(x.flatten(2), *maps).view_as(x), one_by_one(function, x, factor))


@pytest.mark.parametrize("side", [8, 32, 224])
def test_hue_equals_torchvision(side):
    turn = torch.tensor([-0.5, -0.4, -0.1, 0.0, 0.05, 0.3, 0.5])
    x = pictures(len(turn), side) / 255
    expected = one_by_one(TF.adjust_hue, x, turn)
    colour.hue_(x.flatten(2), colour.hue_offsets(turn))
    close(x, expected)


def test_hue_of_every_coarse_colour():
    """All 17^3 colours of a grid, pure, grey, black and white and ties among channels included, by 41 turns of the circle."""
    level = torch.linspace(0, 1, 17)
    colours = torch.cartesian_prod(level, level, level).t()[None, :, :, None]
    for turn in torch.linspace(-0.5, 0.5, 41):
        x = colours.clone()
        colour.hue_(x.flatten(2), colour.hue_offsets(turn[None]))
        close(x, TF.adjust_hue(colours, turn.item()))


@pytest.mark.parametrize(("side", "channels"), SIZES)
def test_other_pointwise_operations_equal_torchvision(side, channels):
    x = pictures(5, side, channels) / 255
    flat = x.flatten(2)
    if channels == 3:
        close(colour.greyscale(flat).reshape(x.shape), TF.rgb_to_grayscale(x, num_output_channels=3))
    threshold = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    close(colour.solarize(flat, threshold[:, None, None]).view_as(x), one_by_one(TF.solarize, x, threshold))
    bits = torch.tensor([4, 5, 6, 7, 8])
    close(colour.posterize(flat, 2.0 ** bits[:, None, None]).view_as(x), one_by_one(TF.posterize, x, bits))
    close(colour.autocontrast(flat * 0.5 + 0.2).view_as(x), TF.autocontrast(x * 0.5 + 0.2))
    even = (0.4 + 1e-6 * flat).contiguous()  # as rounding leaves a channel of one grey
    close(colour.autocontrast(even), even)
    close(colour.equalize(flat).view_as(x), TF.equalize(x))
    factor = torch.tensor([0.0, 0.05, 0.5, 1.0, 1.9])
    close(colour.sharpness(x, factor[:, None, None, None]), one_by_one(TF.adjust_sharpness, x, factor))


def test_jitter_follows_the_order_of_every_image():
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    draws = policy({"name": "moco_v1"}).draw(generator(1), 64)
    order, factors = draws["order"], draws["factors"]
    assert len(order.unique(dim=0)) > 15
    ranked = colour.hue_place(order).argsort(stable=True)
    order, factors = order[ranked], factors[ranked]
    x = pictures(64) / 255
    expected = x.clone()
    for i in range(64):
        for kind in order[i].tolist():
            expected[i] = functions[kind](expected[i], factors[i, kind].item())
    ends = torch.bincount(colour.hue_place(order), minlength=4).cumsum(0).tolist()
    close(colour.color_jitter(x.flatten(2), colour.jitter_plan(order, factors, 3), ends).view_as(x), expected)


@pytest.mark.parametrize(
    ("side", "size", "channels"), [(8, 8, 1), (32, 32, 3), (32, 18, 3), (28, 28, 1), (64, 20, 3), (224, 96, 3), (32, 48, 1), (224, 224, 3)]
)
def test_crops_equal_antialiased_resized_crop(side, size, channels):
    """Enlarging, and shrinking by up to 3.2."""
    count = 12
    images = pictures(count, side, channels)
    crops = draw_crops((0.05, 1.0), (0.5, 2.0), side, generator(side, size), count)
    crops[0] = torch.tensor([0, 0, side, side])
    top, left, height, width = crops.unbind(1)
    flip = torch.arange(count) % 2 == 1
    first, length = torch.stack((top, left), 1), torch.stack((height, width), 1)
    mirrored = torch.stack((torch.zeros_like(flip), flip), 1)
    places = geometry.crop_places(first, length, side, size, mirrored)
    rows, columns = geometry.triangle(*places, shrinks=size < side).unbind(1)
    x = images / 255
    expected = one_by_one(lambda image, *crop: TF.resized_crop(image, *crop, [size, size], antialias=True), x, *crops.unbind(1))
    expected = torch.where(flip[:, None, None, None], expected.flip(3), expected)
    close(geometry.separable(x, rows, columns), expected, 2e-5)
    if size >= side:
        taps = geometry.row_taps(*(tensor[:, 0] for tensor in places))
        close(geometry.mix_columns(geometry.mix_rows(x, *taps), columns), expected, 2e-5)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_equals_pad_and_crop(side, channels):
    x = pictures(9, side, channels)
    offset = torch.arange(9) - 4
    padded = TF.pad(x, [4], padding_mode="reflect")
    expected = torch.stack([TF.crop(padded[i], i, 8 - i, side, side) for i in range(9)])
    assert torch.equal(geometry.shift(x, torch.stack((offset, offset.flip(0)), 1), 4), expected)


@pytest.mark.parametrize(("side", "taps"), [(8, 3), (32, 3), (40, 5), (224, 23)])
def test_blur_equals_torchvision(side, taps):
    x = pictures(4, side) / 255
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0])
    kernels = geometry.blur_matrices(sigma, taps, side)
    close(geometry.separable(x, kernels, kernels), one_by_one(lambda image, s: TF.gaussian_blur(image, [taps, taps], [s, s]), x, sigma))


@pytest.mark.parametrize(("side", "channels"), [(16, 1), (32, 3), (224, 3)])
def test_warps_equal_torchvision_affine(side, channels):
    """Bilinear, black outside, to 1e-4 (3e-4 at 224 px): sampling positions in float32 are that precise."""
    amounts = {"rotate": 25.0, "shear_x": 0.3, "shear_y": -0.2, "translate_x": 0.125, "translate_y": -0.25, "zoom": 0.2}
    operation = torch.tensor([OPERATIONS.index(name) for name in amounts])
    x = pictures(len(amounts), side, channels) / 255
    none = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]}
    arguments = [
        none | {"angle": -25.0},
        none | {"shear": [-math.degrees(math.atan(0.3)), 0.0]},
        none | {"shear": [0.0, math.degrees(math.atan(0.2))]},
        none | {"translate": [0.125 * side, 0.0]},
        none | {"translate": [0.0, -0.25 * side]},
        none | {"scale": 1.2},
    ]
    expected = torch.stack(
        [TF.affine(image, **keys, interpolation=InterpolationMode.BILINEAR) for image, keys in zip(x, arguments, strict=True)]
    )
    close(batched.randaugment.apply(x.clone(), operation, torch.tensor(list(amounts.values()))), expected, 1e-4 if side < 100 else 3e-4)


def test_randaugment_runs_the_drawn_operation_on_each_image():
    x = pictures(8) / 255
    factors = {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "color": TF.adjust_saturation,
        "sharpness": TF.adjust_sharpness,
    }
    names = [*factors, "identity", "autocontrast", "equalize", "solarize"]
    operation = torch.tensor([OPERATIONS.index(name) for name in names])
    result = batched.randaugment.apply(x.clone(), operation, torch.full((8,), 0.4))
    for i, function in enumerate(factors.values()):
        close(result[i], function(x[i], 0.4))
    close(result[4:], torch.stack((x[4], TF.autocontrast(x[5]), TF.equalize(x[6]), TF.solarize(x[7], 0.4))))


def test_whole_policy_equals_torchvision_step_by_step():
    """moco_v2 at 40 px, blur included, from uint8 to the normalised view."""
    moco, images = policy("moco_v2", 40), pictures(32, 40)
    draws = moco.draw(generator(3), 32)
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    expected = []
    for image, row in zip(images, ({key: value[i] for key, value in draws.items()} for i in range(32)), strict=True):
        x = TF.resized_crop(image / 255, *row["crop"].tolist(), [40, 40], antialias=True)
        x = TF.horizontal_flip(x) if row["flip"] else x
        for kind in row["order"].tolist() if row["jitter"] else ():
            x = functions[kind](x, row["factors"][kind].item())
        x = TF.rgb_to_grayscale(x, num_output_channels=3) if row["gray"] else x
        x = TF.gaussian_blur(x, [5, 5], [row["sigma"].item()]) if row["blur"] else x
        expected.append(TF.normalize(x, MEAN, STD))
    close(moco(images, draws), torch.stack(expected), 1e-4)


def test_cutout_covers_a_square_with_the_mean():
    strong = policy({"name": "none", "cutout": 0.5})
    draws = {"cutout": torch.tensor([[0.5, 0.25], [0.0, 1.0]])}
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    covered = (strong(images, draws) == 0).all(1)
    assert covered[0, 8:24, :16].all()
    assert covered[0].sum() == 16 * 16
    assert covered[1, :8, 24:].all()
    assert covered[1].sum() == 8 * 8


def test_none_only_normalises():
    images = pictures(3)
    close(policy("none")(images, policy("none").draw(generator(0), 3)), TF.normalize(images / 255, MEAN, STD))


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (16, 1), (8, 3), (28, 1), (32, 3), (48, 3)])
def test_every_policy_repeats_and_slices_to_the_bit(name, side, channels):
    """Same generator keys, same bits; the views of a slice, of one image or of a shuffled batch are the slice of the views."""
    p = policy(name, side, channels)
    images = pictures(150, side, channels)
    draws = p.draw(generator(0, "view", 1), 150)
    views = p(images, draws)
    assert views.shape == (150, channels, p.size, p.size)
    assert views.dtype == torch.float32
    assert views.isfinite().all()
    assert views.is_contiguous()
    again = p.draw(generator(0, "view", 1), 150)
    assert all(torch.equal(draws[key], again[key]) for key in draws)
    assert torch.equal(p(images, again), views)
    for part in (slice(0, 75), slice(75, 150), slice(3, 40, 5), slice(77, 78), torch.randperm(150, generator=generator(1))):
        assert torch.equal(p(images[part], {key: value[part] for key, value in draws.items()}), views[part])
    if name != "none":
        assert len(p(images[:1].expand(150, -1, -1, -1), draws).flatten(1).unique(dim=0)) > 15
        assert not torch.equal(p(images, p.draw(generator(0, "view", 2), 150)), views)


@pytest.mark.parametrize("name", PAPERS)
def test_slices_of_large_images_and_threads(name):
    p = policy(name, 224)
    images = pictures(5, 224)
    draws = p.draw(generator(0), 5)
    views = p(images, draws)
    for i in range(5):
        assert torch.equal(p(images[i : i + 1], {key: value[i : i + 1] for key, value in draws.items()}), views[i : i + 1])


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("side", "channels"), [(16, 1), (32, 3), (96, 3)])
def test_every_policy_runs_on_the_meta_device(name, side, channels):
    """Which holds no values: whatever reads the device or lies on another one raises."""
    p = policy(name, side, channels)
    views = p(torch.empty((20, channels, side, side), dtype=torch.uint8, device="meta"), p.draw(generator(0), 20))
    assert views.device.type == "meta"
    assert views.shape == (20, channels, p.size, p.size)


def test_autocast_does_not_touch_the_views():
    p, images = policy("moco_v2"), pictures(8)
    draws = p.draw(generator(0), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = p(images, draws)
    assert torch.equal(inside, p(images, draws))


@pytest.mark.parametrize("name", PAPERS)
def test_images_that_may_not_be_mirrored_never_are(name):
    never, sometimes, images = policy(name, mirror=False), policy(name), pictures(20)
    assert sometimes.recipe.flip_probability == (0 if name == "none" else 0.5)
    draws = never.draw(generator(0), 20)
    assert "flip" not in draws
    assert torch.equal(never(images, draws), sometimes(images, draws | {"flip": torch.zeros(20, dtype=torch.bool)}))


def test_flips_and_other_chances_happen_as_often_as_asked():
    draws = policy("byol_b", 224).draw(generator(0), 20_000)
    shares = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}
    for key, share in shares.items():
        assert draws[key].float().mean().item() == pytest.approx(share, abs=0.015)
    assert torch.unique(draws["order"], dim=0).shape == (24, 4)
    low, high = draws["factors"].aminmax(dim=0)
    close(low, torch.tensor([0.6, 0.6, 0.8, -0.1]), 1e-2)
    close(high, torch.tensor([1.4, 1.4, 1.2, 0.1]), 1e-2)
    assert 0.1 <= draws["sigma"].min() < 0.11 < 1.99 < draws["sigma"].max() <= 2


@pytest.mark.parametrize(
    ("side", "scale", "ratio"), [(224, (0.08, 1.0), (3 / 4, 4 / 3)), (32, (0.2, 1.0), (3 / 4, 4 / 3)), (64, (0.4, 0.6), (1.0, 1.0))]
)
def test_crops_keep_to_their_ranges(side, scale, ratio):
    crops = draw_crops(scale, ratio, side, generator(0), 20_000)
    top, left, height, width = crops.double().unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    rounding = 1 / side  # half a pixel on both sides of the smallest crop, as a share of the area
    area = height * width / side**2
    assert scale[0] - rounding <= area.min() < scale[0] + 0.05
    assert scale[1] - 0.1 < area.max() <= scale[1] + rounding
    assert ((width + 0.5) / (height - 0.5)).min() >= ratio[0]
    assert ((width - 0.5) / (height + 0.5)).max() <= ratio[1]
    assert (left == 0).any()
    assert (left + width == side).any()


def test_crops_that_never_fit_fall_back_to_the_centre():
    crops = draw_crops((1.0, 1.0), (2.0, 3.0), 32, generator(0), 5)
    assert crops.tolist() == [[8, 0, 16, 32]] * 5


def test_smaller_crops():
    p = policy({"name": "moco_v2", "size": 96, "crop_scale": [0.05, 0.14]}, 224)
    assert p.size == 96
    assert p(pictures(3, 224), p.draw(generator(0), 3)).shape == (3, 3, 96, 96)


@pytest.mark.parametrize(("side", "size"), [(224, 96), (96, 40), (64, 28), (32, 12), (28, 12), (16, 8), (8, 8)])
def test_local_crops_have_the_papers_share_of_the_side(side, size):
    for name in PAPERS:
        assert policy(name, side).size == (size if name.endswith("_local") else side)
    assert policy("dino_local", side).recipe.crop_scale == ((0.05, 0.4) if side > 64 else (0.2, 0.5))


@pytest.mark.parametrize("mirror", [True, False])
def test_strong_views_of_digits_keep_the_digit(mirror):
    """Of a stroke in the middle two thirds of a 16 px frame at least a third stays, at a third of its contrast or more."""
    p = policy({"name": "strong", "cutout": 0}, 16, 1, mirror)
    images = torch.zeros(2000, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 3:13, 7:9] = 255
    views = plain(p, p(images, p.draw(generator(0), 2000)))
    contrast = views.flatten(1).amax(1) - views.flatten(1).amin(1)
    ink = (views.flatten(1) - views.flatten(1).amin(1, keepdim=True)) / contrast[:, None]
    assert contrast.min() > 0.3 * 0.3 * 0.8  # both operations may cut contrast to 30 %, warps smear the rest
    assert ink.sum(1).min() > 20 / 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "moco_v3"}, "Unknown view policy 'moco_v3': did you mean 'moco_v"),
        ({}, "needs a name"),
        ({"name": "simclr", "crop_scal": [0.4, 1]}, "view policy simclr: unknown key 'crop_scal': did you mean 'crop_scale'"),
        ({"name": "simclr", "crop_scale": [0.4, 1.5]}, "crop_scale"),
        ({"name": "simclr", "crop_scale": [0.9, 0.2]}, "the lower bound comes first"),
        ({"name": "simclr", "crop_scale": [0, 1]}, "crop_scale"),
        ({"name": "simclr", "blur_probability": 2}, "blur_probability = 2 is not possible"),
        ({"name": "simclr", "hue": 0.7}, "hue = 0.7 is not possible"),
        ({"name": "weak", "crop_scale": [0.5, 1]}, "cropped or shifted, not both"),
        ({"name": "weak", "brightness": 0.4}, "brightness does nothing while jitter_probability is not set"),
        ({"name": "weak", "jitter_probability": 0.4}, "jitter_probability does nothing"),
        ({"name": "weak", "size": 16}, "size does nothing while crop_scale is not set"),
        ({"name": "swav_local", "crop_scale": None}, "size = 12 is the side of a crop, and crop_scale is none: set size: null too"),
        ({"name": "strong", "operations": ["rotat"]}, "unknown operation 'rotat': did you mean 'rotate'"),
    ],
)
def test_bad_specs_get_one_clear_sentence(spec, message):
    with pytest.raises(InputError, match=None) as error:
        policy(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_edits_that_the_data_rule_out_are_refused():
    with pytest.raises(InputError, match=r"hue = 0\.1 needs colour"):
        policy({"name": "moco_v2", "hue": 0.1}, channels=1)
    with pytest.raises(InputError, match=r"operations = .* needs colour"):
        policy({"name": "strong", "operations": ["color"]}, channels=1)
    with pytest.raises(InputError, match=r"data\.mirror is false"):
        policy({"name": "weak", "flip_probability": 0.5}, mirror=False)


def test_edits_change_the_record_and_defaults_adapt():
    edited = policy({"name": "simclr", "crop_scale": [0.4, 1.0], "blur_probability": 0}, 224).recipe
    assert (edited.crop_scale, edited.blur_probability, edited.brightness) == ((0.4, 1.0), 0, 0.8)
    assert policy("simclr", 224).recipe.blur_probability == 0.5
    small = policy("simclr", 32).recipe
    assert (small.crop_scale, small.blur_probability, small.brightness) == ((0.2, 1), 0, 0.4)
    grey = policy("byol_a", 28, 1).recipe
    assert (grey.hue, grey.saturation, grey.gray_probability) == (0, 0, 0)
    assert Recipe().num_operations == 0
