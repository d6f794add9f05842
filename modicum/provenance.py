"""What made a result: versions of what computes it, and the commit where Modicum runs from a checkout."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modicum import __version__

LIBRARIES = ("torch", "torchvision", "timm", "faiss-cpu", "scikit-learn", "numpy", "pandas", "pydantic")


def provenance() -> dict[str, str | bool | None]:
    """Versions by distribution name (None: not installed), `commit` and whether the checkout was `modified` since."""
    versions: dict[str, str | bool | None] = {"modicum": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    checkout = Path(__file__).resolve().parent.parent
    commit = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    if commit:
        versions |= {"commit": commit, "modified": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or no commit."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
