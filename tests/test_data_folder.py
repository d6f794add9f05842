"""The source `folder`, on real digits written to disk as PNG files."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from modicum.data import pixel_cache
from modicum.data.fingerprint import input_fingerprint
from modicum.data.listing import SUFFIXES
from modicum.data.pixel_cache import suitable_size
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.settings import DataSettings

DIGITS = (load_digits().images * (255 / 16)).round().astype(np.uint8)
TARGETS = load_digits().target


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


def write(path: Path, number: int = 0, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DIGITS[number]).resize((size, size)).save(path)


def write_flat(root: Path, count: int = 40) -> None:
    for number in range(count):
        write(root / f"{number}.png", number)


def write_csv(path: Path, *rows: str, header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def load(root: Path, **settings):
    return load_images(DataSettings(root=root, **settings))


def test_a_flat_folder_with_a_csv(root, tmp_path):
    write_flat(root)
    labels = write_csv(tmp_path / "labels.csv", *(f"{number}.png,{TARGETS[number]:03d}" for number in range(20)), "30.png,", "")
    images = load(root, labels=labels)
    assert images.name == "folder"
    assert images.pixels.shape == (40, 1, 8, 8)
    assert images.class_names == tuple(f"{number:03d}" for number in range(10))
    assert images.mirror
    for row, path in enumerate(images.manifest["path"]):
        number = int(path.removesuffix(".png"))
        assert np.array_equal(images.pixels[row, 0].numpy(), DIGITS[number])
        assert images.labels[row] == (TARGETS[number] if number < 20 else -1)
    assert set(images.manifest["split"]) == {"train"}
    assert list(images.manifest["id"]) == list(images.manifest["path"])


def test_with_a_csv_folder_names_mean_nothing(root, tmp_path):
    for number, folder in enumerate(["test", "train/deep", "a", "unlabelled"]):
        write(root / folder / "1.PNG", number)
    labels = write_csv(tmp_path / "l.csv", 'a/1.PNG,"cat, big"', "./test/1.PNG,dog", "train/deep/1.PNG,cow")
    images = load(root, labels=labels)
    assert images.class_names == ("cat, big", "cow", "dog")
    assert dict(zip(images.manifest["path"], images.labels, strict=True)) == {
        "a/1.PNG": 0,
        "test/1.PNG": 2,
        "train/deep/1.PNG": 1,
        "unlabelled/1.PNG": -1,
    }
    assert len(images.rows("test")) == 0


def test_headers_and_splits_of_a_csv(root, tmp_path):
    write_flat(root, 5)
    rows = ["x,0.png,a,train", "x,1.png,b,Test", "x,2.png,b,", "x,3.png,,train"]
    labels = write_csv(tmp_path / "l.csv", *rows, header="\ufeffsite, file,class,fold")
    images = load(root, labels=labels, path_column="file", label_column="class", split_column="fold")
    assert list(images.manifest["split"]) == ["train", "test", "train", "train", "train"]
    assert list(images.labels) == [0, 1, 1, -1, -1]


def test_subfolders_are_the_classes(root):
    for number, path in enumerate(
        ["class 10/a.png", "class 2/b.png", "class 2/deep/er/c.png", "d.png", "Unlabeled/e.png", "unlabelled/x/f.png"]
    ):
        write(root / path, number)
    images = load(root)
    assert images.class_names == ("class 2", "class 10")
    labels = dict(zip(images.manifest["path"], images.labels, strict=True))
    assert labels == {
        "class 10/a.png": 1,
        "class 2/b.png": 0,
        "class 2/deep/er/c.png": 0,
        "d.png": -1,
        "Unlabeled/e.png": -1,
        "unlabelled/x/f.png": -1,
    }


def test_train_and_test_folders_are_the_splits(root):
    for number, path in enumerate(
        ["train/a/1.png", "train/b/2.png", "test/a/3.png", "unlabelled/4.png", "train/5.png", "train/unlabelled/6.png"]
    ):
        write(root / path, number)
    images = load(root)
    assert images.class_names == ("a", "b")
    rows = zip(images.manifest["path"], images.labels, images.manifest["split"], strict=True)
    assert sorted(rows) == [
        ("test/a/3.png", 0, "test"),
        ("train/5.png", -1, "train"),
        ("train/a/1.png", 0, "train"),
        ("train/b/2.png", 1, "train"),
        ("train/unlabelled/6.png", -1, "train"),
        ("unlabelled/4.png", -1, "train"),
    ]
    for name, value in (("test_fraction", 0.5), ("split_seed", 1)):
        with pytest.raises(InputError, match=rf"data\.{name} cannot be set: .* has 1 test images of its own"):
            load(root, **{name: value})


def test_train_beside_other_folders_is_a_class(root):
    for number, path in enumerate(["train/1.png", "car/2.png"]):
        write(root / path, number)
    assert load(root).class_names == ("car", "train")


def test_a_share_of_the_labels_is_held_out(root):
    for number in range(60):
        write(root / str(TARGETS[number] % 2) / f"{number}.png", number)
    for number in range(60, 80):
        write(root / f"{number}.png", number)
    images = load(root, test_fraction=0.25)
    test = images.rows("test")
    assert len(test) == 15
    assert (images.labels[test] >= 0).all()
    assert np.abs(np.bincount(images.labels[test]) - np.bincount(images.labels[images.labels >= 0]) / 4).max() <= 1
    assert not np.array_equal(test, load(root, test_fraction=0.25, split_seed=1).rows("test"))


def test_no_label_at_all_is_allowed(root):
    write_flat(root, 5)
    images = load(root)
    assert images.class_names == ()
    assert set(images.labels) == {-1}


def test_size_and_colour_follow_the_images(root):
    write_flat(root, 3)
    Image.fromarray(DIGITS[5]).resize((40, 20)).save(root / "wide.jpg")
    assert load(root).pixels.shape == (4, 1, 8, 8)
    Image.new("RGB", (9, 9), "red").save(root / "z.png")
    images = load(root, image_size=16)
    assert images.pixels.shape == (5, 3, 16, 16)
    assert images.pixels[4].flatten(1).float().mean(1).tolist() == [255, 0, 0]
    assert load(root, channels=1).pixels.shape == (5, 1, 8, 8)


@pytest.mark.parametrize(
    ("sides", "size"), [([5, 6], 8), ([28] * 3, 28), ([31, 33, 35], 32), ([96, 97, 500], 96), ([101], 104), ([900], 224)]
)
def test_the_automatic_size(sides, size):
    assert suitable_size(sides) == size


def test_the_longer_side_is_cropped_about_its_centre(root):
    root.mkdir()
    stripes = np.zeros((8, 24), dtype=np.uint8)
    stripes[:, 8:16] = 200
    Image.fromarray(stripes).save(root / "wide.png")
    Image.fromarray(stripes.T.copy()).save(root / "high.png")
    assert (load(root).pixels == 200).all()


def test_every_kind_of_file_is_read_upright_and_opaque(root):
    root.mkdir()
    grey = np.tile(np.linspace(0, 255, 8).round().astype(np.uint8), (8, 1))
    Image.fromarray(grey).save(root / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "b-16-bit.png")
    sideways = Image.fromarray(np.rot90(grey).copy())  # turned left by 90 degrees; orientation 6 turns it right again
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(root / "c-turned.png", exif=exif)
    Image.fromarray(grey).convert("P").save(root / "d-palette.png")
    Image.fromarray(grey).convert("RGBA").save(root / "e-opaque.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(root / "f-clear.png")
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    palette.save(root / "g-clear-palette.png")
    Image.new("1", (8, 8), 1).save(root / "h-bits.png")
    Image.fromarray(grey).save(root / "i.bmp")
    Image.fromarray(grey).convert("CMYK").save(root / "j.tiff")
    images = load(root, channels=1)
    names = [path[0] for path in images.manifest["path"]]
    for row, name in enumerate(names):
        expected = np.full((8, 8), 255) if name in "fgh" else grey
        assert np.abs(images.pixels[row, 0].numpy().astype(int) - expected).max() <= (2 if name in "dj" else 0), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read(root, suffix):
    write(root / f"a{suffix}", 3, 64)
    assert load(root).pixels.shape[2:] == (64, 64)


def test_a_format_is_known_by_its_content_among_those_of_the_suffixes(root):
    """Cameras write pictures of several frames (MPO) under the name of JPEG, and downloads often have the wrong one."""
    root.mkdir()
    image = Image.fromarray(DIGITS[3]).resize((32, 32))
    for number, kind in enumerate(["MPO", "WEBP", "PNG"]):
        image.save(root / f"{number}.jpg", format=kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    with Image.open(root / "0.jpg") as opened:
        assert opened.format == "MPO"
    assert (load(root).pixels.float() - load(root).pixels[2].float()).abs().max() < 24


def test_a_jpeg_shrunk_while_decoding_looks_the_same(root):
    root.mkdir()
    smooth = Image.fromarray(DIGITS[3]).resize((600, 400), Image.Resampling.BICUBIC)
    smooth.save(root / "a.jpg", quality=95)
    smooth.save(root / "b.png")
    jpeg, png = load(root, image_size=32).pixels.float()
    assert (jpeg - png).abs().max() < 8


def test_hidden_files_and_links_out_of_the_root_are_left_out(root, tmp_path, capsys):
    write(root / "a/1.png")
    write(root / "b/2.png", 2)
    for hidden in (".DS_Store.png", ".thumbnails/3.png", "a/._1.png"):
        write(root / hidden, 3)
    write(tmp_path / "elsewhere/secret.png", 4)
    (root / "a/inside.png").symlink_to(root / "b/2.png")
    (root / "a/outside.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (root / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "notes.txt").write_text("not an image")
    images = load(root)
    assert list(images.manifest["path"]) == ["a/1.png", "a/inside.png", "b/2.png"]
    assert "3 links below" in capsys.readouterr().err


# The cache ------------------------------------------------------------------------------------------------------------


def caches(folder: Path) -> list[str]:
    """The decoded pixels in it."""
    return sorted(path.name for path in folder.glob("*.npy") if not path.name.endswith(".digests.npy"))


def test_images_are_decoded_once(root, monkeypatch):
    write_flat(root, 10)
    first = load(root)
    monkeypatch.setattr(pixel_cache, "decode", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(pixel_cache, "survey", lambda *_: pytest.fail("looked at again"))
    again = load(root)
    assert torch.equal(first.pixels, again.pixels)


def test_changed_images_are_decoded_anew_and_the_old_cache_goes(root):
    write_flat(root, 10)
    load(root)
    load(root, image_size=16)
    before = caches(root / ".modicum")
    assert len(before) == 2
    assert all("-8px-1ch-bilinear" in name or "-16px-1ch-bilinear" in name for name in before)
    write(root / "3.png", 77)
    assert np.array_equal(load(root).pixels[3, 0].numpy(), DIGITS[77])
    assert len(caches(root / ".modicum")) == 1
    assert not set(before) & set(caches(root / ".modicum"))
    assert len(list((root / ".modicum").glob("[0-9a-f]*"))) == 3  # pixels, digests, the note of what auto came to
    write(root / "new.png", 78)
    assert len(load(root).pixels) == 11


def test_a_cache_cut_short_is_made_anew(root):
    write_flat(root, 10)
    whole = load(root).pixels.clone()
    path = root / ".modicum" / caches(root / ".modicum")[0]
    for damaged in (path, path.with_name(path.name.replace(".npy", ".digests.npy"))):
        for size in (damaged.stat().st_size - 10, 0):
            os.truncate(damaged, size)
            assert torch.equal(load(root).pixels, whole)
            assert damaged.stat().st_size > size


def test_where_the_root_cannot_be_written_the_cache_lies_elsewhere(root, tmp_path):
    write_flat(root, 10)
    (root / ".modicum").write_text("a file in the way, as good as a read-only disk")
    images = load(root)
    assert len(caches(next((tmp_path / "cache/modicum/folders").iterdir()))) == 1
    assert torch.equal(load(root).pixels, images.pixels)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of a user whom permissions bind; they do not bind root, who is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if os.getuid() == 0:
                os.chown(folder, 65534, 65534)
                os.seteuid(65534)
            yield Path(folder)
        finally:
            os.seteuid(os.getuid())


@pytest.mark.parametrize("settings", [{}, {"image_size": 16, "channels": 1}])
@pytest.mark.parametrize("private", ["", ".lock", "*.json", "*.digests.npy", "*bilinear.npy"])
def test_what_another_user_keeps_private_is_made_elsewhere(shared, monkeypatch, private, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    write_flat(shared / "images", 5)
    expected = load(shared / "images", **settings).pixels.clone()
    theirs = shared / "images/.modicum"
    if private == ".lock":  # which matters where there is something to be made
        for path in theirs.glob("[0-9a-f]*"):
            path.unlink()
    else:
        theirs.chmod(0o555)
    for path in theirs.glob(private) if private else [theirs]:
        path.chmod(0)
    try:
        assert torch.equal(load(shared / "images", **settings).pixels, expected)
        assert bool(list((shared / "cache").rglob("*.*"))) == (private != "*.json" or not settings)
    finally:
        theirs.chmod(0o777)


@pytest.mark.parametrize(
    "content", [b"", b'{"image_size": 16, "chan', b'{"image_size": 16}', b'{"image_size": "x", "channels": 1}', b"[]", b"\xff"]
)
def test_a_damaged_note_is_made_anew(root, content):
    write_flat(root, 5)
    load(root)
    (note,) = (root / ".modicum").glob("*.json")
    whole = note.read_bytes()
    note.write_bytes(content)
    assert load(root).pixels.shape == (5, 1, 8, 8)
    assert note.read_bytes() == whole


def test_the_fingerprint_follows_images_and_labels(root, tmp_path):
    write_flat(root, 5)
    labels = write_csv(tmp_path / "l.csv", "0.png,a")
    settings = DataSettings(root=root, labels=labels)
    first = input_fingerprint(settings)
    load_images(settings)  # the cache beside the images is not part of them
    assert input_fingerprint(settings) == first
    write_csv(labels, "0.png,b")
    second = input_fingerprint(settings)
    assert second != first
    os.utime(root / "1.png", ns=(0, 0))
    assert input_fingerprint(settings) != second
    with pytest.raises(InputError, match="is not there"):
        input_fingerprint(DataSettings(root=tmp_path / "absent"))
