"""Bad folders and bad label files: one sentence that names every file or row, before anything is trained."""

import inspect
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from modicum.data import pixel_cache
from modicum.data.listing import walk
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.settings import DataSettings

DIGITS = (load_digits().images * (255 / 16)).round().astype(np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return tmp_path / "images"


def write(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DIGITS[number]).save(path)


def write_flat(root: Path, count: int) -> None:
    for number in range(count):
        write(root / f"{number}.png", number)


def write_csv(path: Path, *rows: str, header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def load(root: Path, **settings):
    return load_images(DataSettings(root=root, **settings))


def refusal(root: Path, **settings) -> str:
    with pytest.raises(InputError) as refused:
        load(root, **settings)
    return str(refused.value)


def test_all_unreadable_images_are_listed_at_once(root):
    write_flat(root, 30)
    for number in range(22):
        (root / f"bad{number:02d}.jpg").write_bytes(b"this is no image")
    whole = (root / "0.png").read_bytes()
    (root / "0.png").write_bytes(whole[: len(whole) // 2])
    (root / "1.png").write_bytes(b"")
    message = refusal(root)
    assert "24 of 52 images" in message
    assert "0.png: " in message
    assert "1.png: not an image of a known format" in message
    assert "bad17.jpg" in message
    assert "bad18.jpg" not in message
    assert message.endswith("and 4 more")
    assert refusal(root, image_size=8, channels=1) == message
    assert not list((root / ".modicum").glob("*npy*"))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
DDS = b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(44) + struct.pack("<8I", 32, 0x800, 0, 32, 0, 0, 0, 0) + bytes(84)


@pytest.mark.parametrize("content", [POSTSCRIPT, DDS])
def test_formats_of_no_suffix_are_not_tried(root, content):
    """PostScript would be run by Ghostscript, and Pillow has errors of its own for DDS."""
    root.mkdir()
    (root / "a.png").write_bytes(content)
    assert "a.png: not an image of a known format" in refusal(root)


def test_a_float_image_is_refused_rather_than_guessed(root):
    root.mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(root / "a.tiff")
    assert "floating-point pixels" in refusal(root)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("9.png,a", "row 3: there is no file '9.png' below"),
        (r"sub\1.png,a", "(write / between folders)"),
        ("../images/1.png,a", "row 3: '../images/1.png' leaves the folder"),
        ("sub/../1.png,a", "leaves the folder"),
        ("/etc/passwd,a", "leaves the folder"),
        (r"C:\images\1.png,a", "leaves the folder"),
        ("0.png,a", "row 3: repeats row 2"),
        ("0.png,b", "row 3: labels '0.png' 'b', row 2 labels it 'a'"),
        ("0.png,", "row 3: labels '0.png' '', row 2 labels it 'a'"),
        (",a", "row 3: the path is empty"),
        ("1.png,a,b", "row 3: has 3 fields, the header has 2"),
        (f"{'a heron among reeds ' * 15},a", "row 3: there is no file 'a heron among reeds"),
        ("1\0.png,a", r"row 3: there is no file '1\x00.png' below"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(root, tmp_path, row, sentence):
    write_flat(root, 3)
    write(root / "sub/1.png")
    assert sentence in refusal(root, labels=write_csv(tmp_path / "l.csv", "0.png,a", row))


def test_rows_of_the_wrong_split_are_named(root, tmp_path):
    write_flat(root, 3)
    labels = write_csv(tmp_path / "l.csv", "0.png,a,val", "1.png,,test", header="path,label,split")
    message = refusal(root, labels=labels)
    assert "2 rows of" in message
    assert "row 2: the split 'val' is neither train nor test" in message
    assert "row 3: the test image '1.png' has no label" in message


def test_many_bad_rows_are_counted(root, tmp_path):
    write_flat(root, 3)
    message = refusal(root, labels=write_csv(tmp_path / "l.csv", *(f"missing{number}.png,a" for number in range(50))))
    assert message.startswith("50 rows of")
    assert "row 21:" in message
    assert "row 22:" not in message
    assert message.endswith("and 30 more")


@pytest.mark.parametrize(
    ("header", "settings", "sentence"),
    [
        ("file,label", {}, "has no column 'path' (found: file, label): set data.path_column"),
        ("path,class", {}, "has no column 'label' (found: path, class): set data.label_column"),
        ("path;label", {}, "(found: path;label)"),
        ("path,label", {"split_column": "fold"}, "set data.split_column"),
        ("path,label,label", {}, "has the column 'label' 2 times"),
        ("path,path, path,label", {}, "has the column 'path' 3 times"),
        ("path,label,split,split", {}, "has the column 'split' 2 times"),
    ],
)
def test_a_missing_or_repeated_column_is_named(root, tmp_path, header, settings, sentence):
    write_flat(root, 3)
    assert sentence in refusal(root, labels=write_csv(tmp_path / "l.csv", "0.png,a", header=header), **settings)


@pytest.mark.parametrize("setting", ["path_column", "label_column", "split_column"])
def test_a_column_without_a_csv_is_refused(root, setting):
    write_flat(root, 3)
    assert f"data.{setting} = 'kind' would do nothing without data.labels" in refusal(root, **{setting: "kind"})


def test_a_csv_that_is_none(root, tmp_path):
    write_flat(root, 3)
    path = tmp_path / "l.csv"
    path.write_bytes("path,label\n0.png,Bär\n".encode("latin-1"))
    assert "is not UTF-8" in refusal(root, labels=path)
    path.write_text('path,label\n"0.png"x,a\n')
    assert "is not a valid CSV file" in refusal(root, labels=path)
    path.write_text("")
    assert "(found: none)" in refusal(root, labels=path)
    assert "absent.csv is not there." in refusal(root, labels=tmp_path / "absent.csv")
    assert "is not there." in refusal(root, labels="l" * 300)
    assert "data.labels=~nobody-here/l.csv is not there." in refusal(root, labels="~nobody-here/l.csv")
    (root / "beside.csv").write_text("path,label\n")
    assert f"did you mean {root / 'beside.csv'}?" in refusal(root, labels="beside.csv")


def test_folders_that_cannot_be_used(root, tmp_path):
    assert "data.root is not set" in refusal(None)
    assert "is not there" in refusal(root)
    assert "data.root=~nobody-here/photos is not there" in refusal("~nobody-here/photos")
    assert "File name too long" in refusal(tmp_path / ("r" * 300))
    root.mkdir()
    assert "holds no image" in refusal(root)
    write(root / "a/1.png")
    assert "is a file, not a folder" in refusal(root / "a/1.png")
    (root / "b").mkdir()
    (root / "c/deep").mkdir(parents=True)
    message = refusal(root)
    assert "hold no image" in message
    assert message.endswith("b\n  c")


def test_layouts_that_would_be_misread_are_refused(root):
    write(root / "train/a/1.png")
    write(root / "val/a/2.png")
    assert "only train, test and unlabelled are splits" in refusal(root)
    (root / "val").rename(root / "test")
    write(root / "test/3.png")
    assert "test images below" in refusal(root)
    assert refusal(root).endswith("test/3.png")


def test_a_set_of_test_images_alone_is_refused(root, tmp_path):
    write_flat(root, 2)
    labels = write_csv(tmp_path / "l.csv", "0.png,a,test", "1.png,b,test", header="path,label,split")
    assert "there is none to train on" in refusal(root, labels=labels)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_no_text_are_refused(root):
    write_flat(root, 1)
    with open(os.path.join(os.fsencode(root), b"caf\xe9.png"), "wb") as file:  # noqa: PTH118, PTH123
        file.write((root / "0.png").read_bytes())
    assert "not valid UTF-8" in refusal(root)


def test_copies_between_train_and_test_are_named(root, capsys):
    for number in range(6):
        write(root / f"train/a/{number}.png", number)
    write(root / "test/a/new.png", 50)
    load(root)
    assert "copies" not in capsys.readouterr().err
    Image.fromarray(DIGITS[3]).save(root / "test/a/copy.bmp")  # another file, the same pixels
    load(root)
    assert "test/a/copy.bmp = train/a/3.png" in capsys.readouterr().err


def test_rows_that_name_what_is_not_read(root, tmp_path):
    write(root / "a/1.png")
    write(root / ".hidden.png", 1)
    write(tmp_path / "elsewhere/secret.png", 2)
    (root / "a/outside.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (root / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "notes.txt").write_text("not an image")
    message = refusal(root, labels=write_csv(tmp_path / "l.csv", "a/outside.png,x", "c/secret.png,x", "notes.txt,x", ".hidden.png,x"))
    assert message.count("by a link") == 2
    assert message.count("is not among the images that are read") == 2


def test_a_full_disk_is_one_sentence(root, monkeypatch):
    write_flat(root, 4)

    def full(*_arguments, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixel_cache.np.lib.format, "write_array_header_1_0", full)
    assert "No space left on device" in refusal(root)
    assert not list((root / ".modicum").glob("*npy*"))


def test_a_label_csv_that_may_not_be_read_is_named(root, tmp_path, monkeypatch):
    write_flat(root, 1)
    labels = write_csv(tmp_path / "l.csv", "0.png,a")

    def forbidden(*_arguments, **_keywords):
        raise PermissionError(13, "Permission denied", str(labels))

    monkeypatch.setattr(Path, "open", forbidden)
    assert refusal(root, labels=labels) == f"data.labels={labels} cannot be read: Permission denied."


def test_what_is_named_as_an_image_and_is_no_file_is_none(root, tmp_path):
    """A pipe, which to read would take for ever."""
    write(root / "a/1.png")
    os.mkfifo(root / "a/pipe.png")
    (root / "a/link.png").symlink_to("pipe.png")
    assert [file.path for file in walk(root).files] == ["a/1.png"]
    assert "there is no file 'a/pipe.png'" in refusal(root, labels=write_csv(tmp_path / "l.csv", "a/pipe.png,x"))
    (root / "a/1.png").unlink()
    assert "holds no image" in refusal(root)


def test_folders_lie_deeper_than_python_recurses(root):
    write(root.joinpath(*["deep"] * 150, "1.png"))
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack(0)) + 120)
        assert len(walk(root).folders) == 150
    finally:
        sys.setrecursionlimit(before)


def test_a_label_may_be_a_number_of_any_length(root, tmp_path):
    write_flat(root, 3)
    labels = write_csv(tmp_path / "l.csv", f"0.png,{'9' * 5000}", "1.png,10", "2.png,9")
    assert load(root, labels=labels).class_names == ("9", "10", "9" * 5000)
