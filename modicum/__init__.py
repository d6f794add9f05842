"""Modicum: self-supervised pretraining, semi-supervised fine-tuning and honest evaluation of image classifiers."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the stages lie beside this package, not inside it: let `modicum.pretrain` and its siblings resolve there.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))
