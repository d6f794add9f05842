"""Images that are read anew from their files: the same pixels, views and losses to the last bit, without a cache."""

import itertools
import os
import shutil
import signal
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modicum.cli import main
from modicum.data import image_files, pixel_cache
from modicum.data.decode import decode
from modicum.data.image_files import ImageFiles
from modicum.data.images import Images
from modicum.data.sources import load_images
from modicum.data.stream import Stream
from modicum.errors import InputError
from modicum.record import Metrics
from modicum.settings import DataSettings
from modicum.views.policies import build_policy

SIZE = 24


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of colour photographs, larger than what they are decoded to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for number in range(45):
        path = tmp_path / "photos" / "abc"[number % 3] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def load(root: Path, cache: str) -> Images:
    return load_images(DataSettings(root=root, image_size=SIZE, cache=cache))


def stream(images: Images, batch_size: int = 20, **settings: object) -> Stream:
    policies = [
        build_policy({"name": "moco_v2"}, image_size=SIZE, channels=3, mirror=True, mean=(0.5,) * 3, std=(0.2,) * 3) for _ in range(2)
    ]
    return Stream.of(images, images.rows("train")[5:], policies, batch_size, torch.device("cpu"), 0, "test")


def test_every_way_to_read_them_gives_the_pixels_of_the_cache(root: Path) -> None:
    kept, anew = load(root, "disk"), load(root, "none")
    pixels = anew.pixels
    assert isinstance(pixels, ImageFiles)
    assert pixels.shape == kept.pixels.shape
    rows = np.array([40, 3, 3, 17])
    assert torch.equal(pixels[rows], kept.pixels[rows])
    assert torch.equal(pixels[torch.from_numpy(rows)], kept.pixels[rows])
    assert torch.equal(pixels[7], kept.pixels[7])
    assert torch.equal(pixels[torch.empty(0, dtype=torch.int64)], kept.pixels[:0])
    for found, expected in zip(pixels.split(18), kept.pixels.split(18), strict=True):
        assert torch.equal(found, expected)
    for size in (3, 4):  # several batches, which are decoded ahead, and one
        for found, expected in zip(anew.batches(rows, size), kept.batches(rows, size), strict=True):
            assert torch.equal(found, expected)
    assert torch.equal(torch.cat(list(kept.batches(rows, 3))), kept.pixels[rows])


def test_views_are_the_same_from_any_step_on_and_in_any_order_of_steps(root: Path) -> None:
    kept, anew = stream(load(root, "disk")), stream(load(root, "none"))
    for step in (0, 1, 2, 7, 8, 3):
        one, other = kept.sample(step), anew.sample(step)
        assert torch.equal(one.view(0), other.view(0))
        assert torch.equal(one.view(1, one.permutation()), other.view(1, other.permutation()))


def test_reading_ahead_leaves_torchs_own_randomness_alone(root: Path) -> None:
    anew = stream(load(root, "none"))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    anew.sample(0).view(0)
    assert torch.equal(torch.rand(3), expected)


def test_no_step_is_decoded_twice_for_its_views(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    anew = stream(load(root, "none"))
    sample = anew.sample(0)
    sample.view(0)
    monkeypatch.setattr(image_files, "decode", lambda *_: pytest.fail("decoded in the training process"))
    sample.view(1)
    sample.view(1, sample.permutation())


def test_a_step_beside_the_one_before_it_starts_no_workers_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `meta_pseudo_labels` reads them."""
    anew, cached, starts = stream(load(root, "none")), stream(load(root, "auto")), []
    ahead = image_files.ImageFiles.ahead
    monkeypatch.setattr(image_files.ImageFiles, "ahead", lambda *arguments: starts.append(arguments) or ahead(*arguments))
    for step in range(4):
        sample = anew.sample(step)
        for one, same in ((sample, cached.sample(step)), (sample.previous(), cached.sample(step).previous())):
            assert torch.equal(one.view(0), same.view(0))
    assert len(starts) == 1


def test_workers_outlive_a_signal_to_all_processes_and_end_with_their_stream(root: Path) -> None:
    anew = stream(load(root, "none"))
    anew.sample(0).images  # noqa: B018
    workers = torch.multiprocessing.active_children()
    assert workers
    for worker, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM)):
        os.kill(worker.pid, number)
    expected = stream(load(root, "disk"))
    for step in range(1, 6):
        assert torch.equal(anew.sample(step).images, expected.sample(step).images)
    del anew
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_an_image_damaged_meanwhile_is_named(root: Path) -> None:
    images = load(root, "none")
    (root / "a/12.jpg").write_bytes((root / "a/12.jpg").read_bytes()[:300])
    assert isinstance(images.pixels, ImageFiles)
    for read in (lambda: images.pixels[list(images.manifest["id"]).index("a/12.jpg")], lambda: list(images.pixels.split(45))):
        with pytest.raises(InputError, match=r"^\S+photos/a/12\.jpg can no longer be read: [^\n]*$"):
            read()


def test_damaged_images_and_copies_are_told_before_training_without_a_cache_too(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(root / "a/00.jpg", root / "a/copy.jpg")
    settings = DataSettings(root=root, image_size=SIZE, cache="none", test_fraction=0.5)
    images = load_images(settings)
    assert not list((root / ".modicum").glob("*bilinear.npy"))
    twins = images.manifest.set_index("id").loc[["a/00.jpg", "a/copy.jpg"], "split"]
    assert ("copies of training images" in capsys.readouterr().err) == (twins.nunique() == 2)
    (root / "b/01.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match=r"1 of 46 images below \S+ cannot be read; repair or remove them:\n  b/01\.jpg"):
        load_images(settings)


# The disk -------------------------------------------------------------------------------------------------------------

NEED = 45 * 3 * SIZE * SIZE


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by the name of a folder; elsewhere there is none."""
    free: dict[str, int] = {}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(pixel_cache.shutil, "disk_usage", lambda place: usage(free.get(Path(place).name, 0)))
    return free


def test_a_disk_too_small_is_refused_in_one_sentence(root: Path, room: dict[str, int]) -> None:
    room[".modicum"] = NEED - 1
    with pytest.raises(InputError) as refusal:
        load(root, "disk")
    assert str(refusal.value) == (
        f"The decoded images need 0.1 MiB, but {root / '.modicum'} has only 0.1 MiB free: make room, choose a smaller data.image_size, "
        "or set data.cache=none, which reads the files anew in every epoch."
    )
    room[".modicum"] = NEED
    assert isinstance(load(root, "disk").pixels, torch.Tensor)


def test_left_auto_they_are_read_anew_where_there_is_no_room_and_the_reason_is_told(
    root: Path, room: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(load(root, "auto").pixels, ImageFiles)
    assert "has only 0.0 MiB free, so the files are read anew" in capsys.readouterr().err
    room[".modicum"] = NEED
    assert isinstance(load(root, "auto").pixels, torch.Tensor)
    room.clear()
    assert isinstance(load(root, "auto").pixels, torch.Tensor)  # what is there needs no room
    assert isinstance(load(root, "none").pixels, ImageFiles)


def test_the_second_place_serves_where_the_first_has_no_room(root: Path, room: dict[str, int], tmp_path: Path) -> None:
    place = tmp_path / "cache/modicum/folders"
    load(root, "none")
    load(root, "auto")
    room[next(place.iterdir()).name] = NEED
    assert isinstance(load(root, "disk").pixels, torch.Tensor)
    assert list(place.glob("*/*-24px-3ch-bilinear.npy"))


def test_processes_that_start_together_decode_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def counted(path: Path, *sizes: int) -> np.ndarray:
        decoded.append(path)
        return decode(path, *sizes)

    monkeypatch.setattr(pixel_cache, "decode", counted)
    with ThreadPoolExecutor(3) as pool:  # a lock belongs to who opened the file, threads too
        first, *others = pool.map(lambda _: load(root, "auto").pixels[:], range(3))
    assert all(torch.equal(first, other) for other in others)
    assert len(decoded) == 45


def test_a_cache_that_is_there_needs_no_place_to_write_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load(root, "disk").pixels
    monkeypatch.setattr(pixel_cache, "_is_writable", lambda place: False)
    assert torch.equal(load(root, "disk").pixels, kept)
    with pytest.raises(InputError, match="can be written to: the decoded images need a place"):
        load_images(DataSettings(root=root, image_size=8))


def test_images_in_memory_have_no_cache_to_choose() -> None:
    with pytest.raises(InputError, match=r"data\.cache is for folders of images; digits is kept in memory"):
        load_images(DataSettings(name="digits", cache="none"))


# The stages -----------------------------------------------------------------------------------------------------------

CONFIG = """
data: {image_size: 24, test_fraction: 0.3}
precision: fp32
backbone: {name: resnet10_tiny}
pretrain: {method: moco_v2, epochs: 2, batch_size: 12, log_every: 1}
finetune: {method: fixmatch, labels: 9, steps: 3, batch_size: 4, mu: 2, log_every: 1, baselines: [pretrained]}
evaluate: {bootstrap: 10}
"""


def test_all_stages_say_the_same_to_the_last_bit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(CONFIG)
    for cache in ("disk", "none"):
        with pytest.raises(SystemExit) as ended:
            main(["run", "small.yaml", "--run", cache, f"data.root={root}", f"data.cache={cache}"])
        assert not ended.value.code
    for stage in ("pretrain", "finetune", "finetune/baselines/pretrained"):
        disk, none = (Metrics.read(tmp_path / cache / stage / "metrics.csv") for cache in ("disk", "none"))
        assert disk == none
        assert any(name == "loss" for _, name, _ in disk)
    for file in ("evaluate/results.csv", "evaluate/predictions.csv", "evaluate/neighbours.csv"):
        assert Path("disk", file).read_bytes() == Path("none", file).read_bytes()
