"""The formats that this stage writes, each file whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save

from modicum.files import replacing, write_atomically


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Strict JSON: NaN, which other readers refuse, is an error here."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_table(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    with replacing(path) as file:
        table.to_csv(file, index=index, lineterminator="\n")


def write_tensor(path: Path, name: str, tensor: torch.Tensor, fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({name: tensor.contiguous()}, metadata={"fingerprint": fingerprint}))


def read_tensor(path: Path, name: str, fingerprint: str) -> torch.Tensor | None:
    """What `write_tensor` left, or None if nothing, or something of another fingerprint, is there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if (file.metadata() or {}).get("fingerprint") == fingerprint else None
