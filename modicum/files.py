"""Files that are whole or not there, and what tells one file's content from another's."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, beside `path`; it takes that name when the block ends well and vanishes when it does not.

    A killed process or a full disk thus leaves the old content or the new, never half of it. A kill can leave a hidden
    `.NAME.RANDOM.tmp` behind; a run folder sweeps those when it is next locked. Raises OSError where `path` cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # process numbers repeat on the hosts that share a disk
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def write_atomically(path: Path, content: str | bytes) -> None:
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_table(path: Path, table: "pd.DataFrame", *, index: bool = False) -> None:
    """The table as CSV, the same bytes for the same table on every system."""
    with replacing(path) as file:
        table.to_csv(file, index=index, lineterminator="\n")


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` as a shell has them. A user that is not known stays in it, where pathlib raises RuntimeError."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def content_hash(path: Path) -> str:
    """32 hexadecimal digits of a file's content, or of the names and contents of all files below a folder."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
