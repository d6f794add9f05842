"""Built-in image sets: digits, Fashion-MNIST, and tiny sets in the real on-disk formats that torchvision reads."""

import gzip
import pickle
import shutil
import struct
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

from modicum.data import catalogue, sources
from modicum.data.fingerprint import input_fingerprint
from modicum.data.sources import fit, load_images
from modicum.errors import InputError
from modicum.settings import DataSettings

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is read from or written to the cache of the person who runs the tests, and nothing is downloaded."""

    def no_network(*_arguments, **_keywords):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def no_checksums(monkeypatch):
    """torchvision knows the checksums of the real files; those of the tiny ones below can only differ."""
    for module in ("cifar", "stl10", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


def test_digits_are_all_there_and_stratified():
    images = load_images(DataSettings(name="digits"))
    assert images.pixels.shape == (1797, 1, 16, 16)
    assert (len(images.rows("train")), len(images.rows("test"))) == (1347, 450)
    assert images.class_names == tuple("0123456789")
    assert not images.mirror
    assert images.manifest["id"].is_unique
    assert np.array_equal(images.labels, load_digits().target)
    test = np.bincount(images.labels[images.rows("test")])
    assert np.abs(test - np.bincount(images.labels) * 450 / 1797).max() < 1


def test_digits_keep_their_pixels():
    raw = torch.from_numpy(load_digits().images)
    small = load_images(DataSettings(name="digits", image_size=8)).pixels[:, 0]
    assert torch.equal(small, (raw * 255 / 16).round().to(torch.uint8))
    large = load_images(DataSettings(name="digits", image_size=16)).pixels
    expected = functional.interpolate(small[:, None].float(), size=(16, 16), mode="bilinear", antialias=True)
    assert (large.float() - expected).abs().max() <= 0.5 + 1e-4


def test_the_split_seed_moves_the_test_set():
    first, same, other = (load_images(DataSettings(name="digits", split_seed=seed)).rows("test") for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert len(other) == len(first)
    assert not np.array_equal(first, other)
    assert len(load_images(DataSettings(name="digits", test_fraction=0)).rows("test")) == 0


def test_size_colour_and_mirror_can_be_chosen():
    images = load_images(DataSettings(name="digits", image_size=24, channels=3, mirror=True))
    assert images.pixels.shape == (1797, 3, 24, 24)
    assert torch.equal(images.pixels[:, 0], images.pixels[:, 2])
    assert images.mirror


def test_grey_is_what_pillow_makes_of_colour():
    colour = RANDOM.integers(0, 256, (4, 3, 12, 12), dtype=np.uint8)
    grey = fit(torch.from_numpy(colour), 12, 1)[:, 0].numpy().astype(int)
    pillow = np.stack([np.asarray(Image.fromarray(each.transpose(1, 2, 0)).convert("L")) for each in colour])
    assert np.abs(grey - pillow).max() <= 1


def raw_idx(path):
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(
        struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    )


@pytest.mark.skipif(not catalogue.DEBIAN_FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_found_where_debian_puts_it():
    images = load_images(DataSettings(name="fashion_mnist"))
    folder = catalogue.DEBIAN_FASHION_MNIST
    assert images.pixels.shape == (70000, 1, 28, 28)
    assert images.mirror
    assert images.class_names[9] == "Ankle boot"
    for split, name in (("train", "train"), ("test", "t10k")):
        rows = images.rows(split)
        assert np.array_equal(images.pixels[rows, 0].numpy(), raw_idx(folder / f"{name}-images-idx3-ubyte.gz"))
        assert np.array_equal(images.labels[rows], raw_idx(folder / f"{name}-labels-idx1-ubyte.gz"))


def write_idx(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder, suffix="", value=1):
    for name, count in (("train", 6), ("t10k", 4)):
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", np.full((count, 28, 28), value, dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8))


@pytest.mark.parametrize(("below", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz")])
def test_fashion_mnist_is_found_below_the_root(tmp_path, below, suffix):
    write_fashion(tmp_path / "set" / below, suffix)
    images = load_images(DataSettings(name="fashion_mnist", root=tmp_path / "set"))
    assert (len(images.rows("train")), len(images.rows("test"))) == (6, 4)
    assert list(images.labels) == [*range(6), *range(4)]


def test_fashion_mnist_is_looked_for_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    write_fashion(tmp_path / "cache/modicum/FashionMNIST/raw", value=3)
    assert load_images(DataSettings(name="fashion_mnist")).pixels[0, 0, 0, 0] == 3
    write_fashion(tmp_path / "debian", ".gz", value=2)
    assert load_images(DataSettings(name="fashion_mnist")).pixels[0, 0, 0, 0] == 2
    assert "holds no fashion_mnist" not in capsys.readouterr().err
    load_images(DataSettings(name="fashion_mnist", root=tmp_path / "mistyped"))
    assert "mistyped holds no fashion_mnist" in capsys.readouterr().err.replace("\n", "")


def test_missing_fashion_mnist_names_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    for ask in (load_images, input_fingerprint):
        with pytest.raises(InputError, match=r"apt-get install dataset-fashion-mnist.*data\.root"):
            ask(DataSettings(name="fashion_mnist"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn", "eurosat"])
def test_a_missing_set_says_where_to_put_its_files(name, tmp_path):
    for ask in (load_images, input_fingerprint):
        with pytest.raises(InputError) as refused:
            ask(DataSettings(name=name, root=tmp_path / "sets"))
        assert "no network in tests" in str(refused.value)
        assert catalogue.BUILT_IN[name].files[0] in str(refused.value)
        assert str(tmp_path / "sets") in str(refused.value)


def test_a_damaged_idx_file_is_named(tmp_path):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, sentence in (
        (whole[:-1], "should hold 4,704 bytes"),
        (b"GIF89a..", "not a file of bytes in idx format"),
        (b"", "idx format"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            load_images(DataSettings(name="fashion_mnist", root=tmp_path))
    path.write_bytes(whole)
    labels = tmp_path / "train-labels-idx1-ubyte"
    for wrong in (np.array([0, 1, 2, 3, 4, 10], dtype=np.uint8), np.zeros((6, 1, 1), dtype=np.uint8)):
        write_idx(labels, wrong)
        with pytest.raises(InputError, match="do not hold images and labels of 10 classes"):
            load_images(DataSettings(name="fashion_mnist", root=tmp_path))
    write_idx(labels, np.arange(6, dtype=np.uint8))
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_images(DataSettings(name="fashion_mnist", root=tmp_path))


def write_cifar(root, folder, files, label_key, meta, classes):
    (root / folder).mkdir()
    content = {}
    for number, name in enumerate(files):
        content[name] = RANDOM.integers(0, 256, (5, 3072), dtype=np.uint8)
        labels = [(number + each) % classes for each in range(5)]
        (root / folder / name).write_bytes(pickle.dumps({"data": content[name], label_key: labels}))
    file, key = meta
    (root / folder / file).write_bytes(pickle.dumps({key: [f"class {number}" for number in range(classes)]}))
    return content


@pytest.mark.usefixtures("no_checksums")
def test_cifar_is_read_from_its_pickles(tmp_path):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    ten = write_cifar(tmp_path, "cifar-10-batches-py", [*batches, "test_batch"], "labels", ("batches.meta", "label_names"), 10)
    images = load_images(DataSettings(name="cifar10", root=tmp_path))
    assert images.pixels.shape == (30, 3, 32, 32)
    assert np.array_equal(images.pixels[5].flatten().numpy(), ten["data_batch_2"][0])
    assert np.array_equal(images.pixels[images.rows("test")].flatten(1).numpy(), ten["test_batch"])
    assert list(images.labels[:6]) == [0, 1, 2, 3, 4, 1]
    assert images.mirror
    hundred = write_cifar(tmp_path, "cifar-100-python", ["train", "test"], "fine_labels", ("meta", "fine_label_names"), 100)
    grey = load_images(DataSettings(name="cifar100", root=tmp_path, channels=1, image_size=16))
    assert grey.pixels.shape == (10, 1, 16, 16)
    assert grey.num_classes == 100
    assert abs(grey.pixels[0].float().mean() - np.array([0.299, 0.587, 0.114]) @ hundred["train"][0].reshape(3, -1).mean(1)) < 1


def test_a_wrong_checksum_is_damage(tmp_path):
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    write_cifar(tmp_path, "cifar-10-batches-py", [*batches, "test_batch"], "labels", ("batches.meta", "label_names"), 10)
    with pytest.raises(InputError, match=r"files of cifar10 below .* are damaged"):
        load_images(DataSettings(name="cifar10", root=tmp_path))


@pytest.mark.usefixtures("no_checksums")
def test_stl10_has_an_unlabelled_split(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = {}
    for name, count in (("train", 4), ("unlabeled", 3), ("test", 2)):
        pixels[name] = RANDOM.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pixels[name].transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")  # the file holds columns first
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) + 1).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {number}" for number in range(10)))
    images = load_images(DataSettings(name="stl10", root=tmp_path))
    assert list(images.labels) == [0, 1, 2, 3, -1, -1, -1, 0, 1]
    assert list(images.manifest["split"]) == ["train"] * 7 + ["test"] * 2
    assert np.array_equal(images.pixels.numpy(), np.concatenate([pixels["train"], pixels["unlabeled"], pixels["test"]]))
    assert images.manifest["path"][4] == "unlabelled/000000"


@pytest.mark.usefixtures("no_checksums")
def test_svhn_is_read_from_its_mat_files(tmp_path):
    from scipy.io import savemat

    pixels = RANDOM.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[1], [10], [9]], dtype=np.uint8)})
    images = load_images(DataSettings(name="svhn", root=tmp_path))
    assert np.array_equal(images.pixels[:3].numpy(), pixels)
    assert list(images.labels) == [1, 0, 9, 1, 0, 9]
    assert not images.mirror


def test_eurosat_is_split_by_class(tmp_path, monkeypatch):
    for name in ("Forest", "River"):
        folder = tmp_path / "eurosat/2750" / name
        folder.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{name}_{number}.jpg")
    with pytest.raises(InputError, match="holds 20 images, EuroSAT has 27,000"):
        load_images(DataSettings(name="eurosat", root=tmp_path))
    monkeypatch.setattr(sources, "EUROSAT_IMAGES", 20)
    images = load_images(DataSettings(name="eurosat", root=tmp_path))
    assert images.pixels.shape == (20, 3, 64, 64)
    assert images.name == "eurosat"
    assert images.class_names == ("Forest", "River")
    assert list(np.bincount(images.labels[images.rows("test")])) == [2, 2]
    assert sorted(path.name for path in (tmp_path / "eurosat/2750").iterdir()) == ["Forest", "River"]
    assert len(load_images(DataSettings(name="eurosat", root=tmp_path, test_fraction=0.5)).rows("test")) == 10


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "digitz"}, "Unknown data.name 'digitz': did you mean 'digits'?"),
        ({"name": "imagenet"}, "Unknown data.name 'imagenet'"),
        ({"name": "digits", "labels": "labels.csv"}, "data.labels is for data.name=folder"),
        ({"name": "digits", "root": "photos"}, "data.root = photos would do nothing: digits comes with scikit-learn. Set data.name=folder"),
        ({"name": "digits", "label_column": "species"}, "data.label_column = 'species' would do nothing without data.labels"),
        ({"name": "fashion_mnist", "split_column": "fold"}, "data.split_column = 'fold' would do nothing without data.labels"),
        ({"name": "fashion_mnist", "test_fraction": 0.5}, "data.test_fraction cannot be set: fashion_mnist has a test split of its own"),
        ({"name": "fashion_mnist", "split_seed": 3}, "data.split_seed cannot be set: fashion_mnist has a test split of its own"),
    ],
)
def test_settings_that_a_set_would_ignore_are_refused(settings, sentence):
    for ask in (load_images, input_fingerprint):
        with pytest.raises(InputError) as refused:
            ask(DataSettings(**settings))
        assert sentence in str(refused.value)


def test_the_fingerprint_follows_the_files(tmp_path):
    write_fashion(tmp_path / "a")
    settings = DataSettings(name="fashion_mnist", root=tmp_path / "a")
    first = input_fingerprint(settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert input_fingerprint(DataSettings(name="fashion_mnist", root=tmp_path / "b")) == first
    write_idx(tmp_path / "a/train-labels-idx1-ubyte", np.arange(7, dtype=np.uint8))
    assert input_fingerprint(settings) != first
    assert input_fingerprint(DataSettings(name="digits")) not in {first, input_fingerprint(settings)}
    with pytest.raises(InputError, match="6 train images, 7 labels"):
        load_images(settings)


def test_the_fingerprint_needs_no_heavy_import(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import sys; from modicum.settings import DataSettings; from modicum.data.fingerprint import input_fingerprint as f;"
        f"f(DataSettings(name='digits')); f(DataSettings(root={str(tmp_path)!r}));"
        "print([m for m in ('torch', 'sklearn', 'pandas', 'numpy', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
