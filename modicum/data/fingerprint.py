"""A fingerprint of a run's input, cheap enough to ask for at every start: names, sizes and times, never pixels."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version

from modicum.data.catalogue import find_set
from modicum.data.listing import label_file, walk
from modicum.settings import DataSettings


def digest(parts: Iterable[object]) -> str:
    """32 hexadecimal digits of a sequence of JSON values."""
    text = "\n".join(json.dumps(part, ensure_ascii=True) for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def input_fingerprint(settings: DataSettings) -> str:
    """Changes when the images or labels that `settings` name change. Imports neither torch nor scikit-learn (unless a set must be fetched).

    For digits the version of scikit-learn, for built-in sets names and sizes, for a folder every image's path, size and
    time of change with the content of the label CSV. Raises InputError where the data are missing.
    """
    if settings.name == "folder":
        labels = label_file(settings)
        content = hashlib.sha256(labels.read_bytes()).hexdigest() if labels else None
        tree = walk(settings.root)
        return digest([content, tree.folders, *tree.files])
    files = find_set(settings)
    if settings.name == "digits":
        return digest(["digits", version("scikit-learn")])
    if settings.name == "eurosat":
        return digest(["eurosat", *((file.path, file.size) for file in walk(files[0]).files)])
    return digest([settings.name, *((file.name, file.stat().st_size) for file in files)])
