"""The built-in image sets: what they are, where their files lie. Light: shared by the loader and the fingerprint."""

import os
from dataclasses import dataclass
from pathlib import Path

from modicum.config import did_you_mean
from modicum.data.listing import refuse_another_split, refuse_idle_columns
from modicum.errors import InputError
from modicum.files import expanded
from modicum.settings import DataSettings

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts it
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class BuiltIn:
    """An image set known by name. `files` lie below its root as torchvision lays them out."""

    image_size: int
    channels: int
    mirror: bool  # a mirrored image is still an image of its class
    files: tuple[str, ...]
    test_fraction: float | None = None  # of sets without an official split


BUILT_IN = {
    "digits": BuiltIn(16, 1, mirror=False, files=(), test_fraction=0.25),
    "fashion_mnist": BuiltIn(28, 1, mirror=True, files=tuple(f"FashionMNIST/raw/{name}" for name in IDX_FILES)),
    "cifar10": BuiltIn(
        32,
        3,
        mirror=True,
        files=tuple(f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")),
    ),
    "cifar100": BuiltIn(32, 3, mirror=True, files=tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta"))),
    "stl10": BuiltIn(
        96,
        3,
        mirror=True,
        files=tuple(
            f"stl10_binary/{name}"
            for name in ("train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin", "class_names.txt")
        ),
    ),
    "svhn": BuiltIn(32, 3, mirror=False, files=("train_32x32.mat", "test_32x32.mat")),
    "eurosat": BuiltIn(64, 3, mirror=True, files=("eurosat/2750",), test_fraction=0.2),
}


def cache_root() -> Path:
    """Where what is downloaded or derived is kept: `$XDG_CACHE_HOME/modicum`, by default `~/.cache/modicum`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modicum"


def built_in(settings: DataSettings) -> BuiltIn:
    """The entry of `settings.name`. Raises InputError for an unknown name and for settings that the set would ignore."""
    name = settings.name
    if name not in BUILT_IN:
        raise InputError(f"Unknown data.name {name!r}{did_you_mean(name, [*BUILT_IN, 'folder'])}")
    if settings.labels is not None:
        raise InputError(f"data.labels is for data.name=folder; {name} has labels of its own: remove the setting.")
    refuse_idle_columns(settings)
    if settings.root is not None and not BUILT_IN[name].files:
        raise InputError(
            f"data.root = {settings.root} would do nothing: {name} comes with scikit-learn. Set data.name=folder for images of your own, "
            "or remove the setting."
        )
    if settings.cache != "auto" and name != "eurosat":  # which is a folder of images
        raise InputError(f"data.cache is for folders of images; {name} is kept in memory: remove the setting.")
    if BUILT_IN[name].test_fraction is None:
        refuse_another_split(settings, f"{name} has a test split of its own")
    return BUILT_IN[name]


def download_root(settings: DataSettings) -> Path:
    return expanded(settings.root) if settings.root else cache_root()


def find_set(settings: DataSettings) -> list[Path]:
    """The files of a built-in set, in the order of the catalogue; downloaded where they are missing.

    Raises InputError, with the command or the place that helps, where they can be neither found nor downloaded.
    """
    known = built_in(settings)
    files = _present(settings)
    if files is None:
        # Only here, because it imports torch, which a finished run has no time for.
        from modicum.data.torchvision_sets import download

        failure = download(settings.name, download_root(settings))
        files = _present(settings)
        if files is None:
            raise InputError(_how_to_get(settings.name, known, download_root(settings), failure or "the files are still missing"))
    return files


def _present(settings: DataSettings) -> list[Path] | None:
    if settings.name == "fashion_mnist":
        places = [root / below for root in ([download_root(settings)] if settings.root else []) for below in ("", "FashionMNIST/raw")]
        for place in (*places, DEBIAN_FASHION_MNIST, cache_root() / "FashionMNIST/raw"):
            files = [_plain_or_packed(place / name) for name in IDX_FILES]
            if all(file.is_file() for file in files):
                return files
        return None
    files = [download_root(settings) / name for name in BUILT_IN[settings.name].files]
    return files if all(file.exists() for file in files) else None


def _plain_or_packed(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _how_to_get(name: str, known: BuiltIn, root: Path, failure: str) -> str:
    where = f"{root} holds no {name}, and downloading it failed ({failure})"
    if name == "fashion_mnist":
        return (
            f"{where}. Get it by `apt-get install dataset-fashion-mnist`, or put {', '.join(f'{file}.gz' for file in IDX_FILES)} "
            "into a folder and set data.root to it."
        )
    return f"{where}. Put {', '.join(known.files)} below {root}, or below another folder that data.root names."
