"""The folder of one run: its lock, its settings, which stages are done and on what they depend."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from modicum import __version__
from modicum.config import flatten
from modicum.errors import InputError
from modicum.files import write_atomically
from modicum.record import is_rank_zero
from modicum.settings import HARMLESS

STAGES = ("pretrain", "finetune", "evaluate")
LOCK = ".lock"
MISSING = "(not there)"
RESULTS = {"pretrain": "backbone/model.safetensors", "finetune": "classifier/model.safetensors", "evaluate": "results.json"}


def chain(init: str) -> tuple[str, ...]:
    """The stages of a run whose `finetune.init` is `init`: without the first where stage two starts from elsewhere."""
    return STAGES if init == "pretrain" else STAGES[1:]


def depends(stage: str, key: str, init: str) -> bool:
    """Whether a stage's result depends on a setting, or on `inputs.KEY`, the content that a setting names."""
    key = key.removeprefix("inputs.")
    section = "finetune" if key == "evaluate.cross_validate" else key.partition(".")[0]  # the refits are stage two's work
    if key in HARMLESS:
        return False
    if section == "pretrain":
        return stage == "pretrain" or init == "pretrain"
    return section not in STAGES or STAGES.index(section) <= STAGES.index(stage)


@dataclass(frozen=True)
class Change:
    """A setting or an input that differs from what the run folder was made with, and the begun stages that depend on it."""

    key: str
    old: Any
    new: Any
    stages: tuple[str, ...]

    def __str__(self) -> str:
        if self.key == "inputs.data":
            return "the images or labels in the data set have changed"
        if self.key.startswith("inputs."):
            return f"the content of {self.key.removeprefix('inputs.')} has changed"
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def in_words(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class RunFolder:
    """Where one resolved experiment lives. Nothing is created before `lock`, so bad input leaves no folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def stage(self, name: str) -> Path:
        assert name in STAGES
        return self.path / name

    @property
    def features(self) -> Path:
        """What networks said of the images, for all stages."""
        return self.path / "features"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def exists(self) -> bool:
        """Whether this is a run folder already. Raises InputError for a file, or a folder of something else."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise InputError(f"{self.path} is a file; --run takes a folder.")
        if (self.path / "experiment.yaml").is_file():
            return True
        strangers = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")]
        if strangers:
            raise InputError(f"{self.path} is no run folder: it holds {min(strangers)!r} but no experiment.yaml. Choose another --run.")
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes out while the block runs, and makes the folder. The system frees a killed process's lock.

        Of torchrun's ranks the first holds it for all. Raises InputError where another process holds it.
        """
        if not is_rank_zero():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise InputError(f"The run folder {self.path} cannot be made: {error.strerror}. Choose another --run.") from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                raise InputError(
                    f"The run folder {self.path} is in use by another process ({holder or 'just started'}). "
                    "Wait for it, or choose another --run."
                ) from None
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            for leftover in list(self.path.rglob(".*.tmp")):  # of a process killed in the middle of a write, or of clearing
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                leftover.unlink(missing_ok=True)
            yield
        finally:
            os.close(descriptor)

    def recorded(self) -> dict[str, Any] | None:
        """The content of experiment.yaml, or None where there is none."""
        path = self.path / "experiment.yaml"
        if not path.is_file():
            return None
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            flatten(content["finetune"]["init"])
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
            raise InputError(f"{path} cannot be read as a run's settings. Restore it, or choose another --run.") from None
        return content

    def record(self, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Writes experiment.yaml: the resolved settings, and what made them in a block `provenance`."""
        text = yaml.safe_dump({**settings, "provenance": dict(provenance)}, sort_keys=False, allow_unicode=True)
        write_atomically(self.path / "experiment.yaml", "# The resolved settings of this run, written by Modicum.\n" + text)

    def begun(self, stage: str) -> bool:
        """Whether the stage, or a run inside it, has left a state to resume from or a result."""
        return any(entry.name in {"state.pt", "done.json", "model.safetensors"} for entry in self.stage(stage).rglob("*.*"))

    def changes(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[Change]:
        """What differs from experiment.yaml, harmless settings apart. Empty where there is no experiment.yaml."""
        recorded = self.recorded()
        if recorded is None:
            return []
        init = recorded["finetune"]["init"]
        old_inputs = recorded.pop("provenance", {}).get("inputs", {})
        old = flatten(recorded) | {f"inputs.{key}": value for key, value in old_inputs.items()}
        new = flatten(dict(settings)) | {f"inputs.{key}": value for key, value in inputs.items()}
        begun = [stage for stage in STAGES if self.begun(stage)]
        return [
            Change(key, before, after, tuple(stage for stage in begun if depends(stage, key, init)))
            for key in [*new, *(key for key in old if key not in new)]
            if (before := old.get(key, MISSING)) != (after := new.get(key, MISSING)) and key not in HARMLESS
        ]

    def stages_to_clear(self, changes: Sequence[Change], *, force: bool, again: str | None) -> list[str]:
        """The stages whose results must go before the run: from `again` on, and with `force` those that depend on what has changed.

        What a stage left that has not begun, such as tables of its first minute, goes with any change. Raises InputError that lists the
        changes where a begun stage depends on them and neither wish was said.
        """
        clearing = set(STAGES[STAGES.index(again) :]) if again else set()
        refused = [change for change in changes if set(change.stages) - clearing]
        if refused and not force:
            listed = "".join(f"\n  {change}" for change in refused)
            begun = sorted({stage for change in refused for stage in change.stages}, key=STAGES.index)
            raise InputError(
                f"The run folder {self} belongs to other settings:{listed}\n"
                f"Choose another folder by --run, or clear {in_words(begun)} there and run them again by --force."
            )
        left = [stage for stage in STAGES if changes and self.stage(stage).is_dir() and not self.begun(stage)]
        return sorted(clearing.union(left, *(change.stages for change in refused)), key=STAGES.index)

    def clear(self, stages: Iterable[str]) -> list[str]:
        """Deletes what the stages made and returns their names; last stage first, so that a kill leaves no result without its ground.

        Each goes out of sight as a whole before it is deleted, so that a kill leaves no half of it either.
        """
        cleared = []
        for stage in sorted(stages, key=STAGES.index, reverse=True):
            if stage == "evaluate":
                self.report.unlink(missing_ok=True)
                self.report.with_suffix(".md").unlink(missing_ok=True)
            folder = self.stage(stage)
            if folder.is_dir():
                hidden = folder.with_name(f".{stage}.tmp")  # which the next lock would sweep
                folder.replace(hidden)
                shutil.rmtree(hidden)
                cleared.append(stage)
        return cleared[::-1]

    def finished(self, stage: str, stages: Iterable[str] = STAGES) -> bool:
        """Whether the stage is done, and built on all that the stages before it (of the run's `stages`) have done by now."""
        done = self._done(stage)
        return done is not None and done["after"] == self._before(stage, stages)

    def done(self, stage: str, fingerprint: str, stages: Iterable[str] = STAGES) -> bool:
        """Whether the stage is finished with exactly these settings and inputs."""
        done = self._done(stage)
        return done is not None and done["fingerprint"] == fingerprint and self.finished(stage, stages)

    def mark_done(self, stage: str, fingerprint: str, stages: Iterable[str] = STAGES) -> None:
        """Writes the stage's done.json; the last thing a stage does."""
        content = {
            "stage": stage,
            "fingerprint": fingerprint,
            "after": self._before(stage, stages),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "modicum": __version__,
        }
        write_atomically(self.stage(stage) / "done.json", json.dumps(content, indent=2) + "\n")

    def _before(self, stage: str, stages: Iterable[str]) -> list[str]:
        return [earlier for earlier in stages if STAGES.index(earlier) < STAGES.index(stage) and self._done(earlier)]

    def _done(self, stage: str) -> dict[str, Any] | None:
        """What done.json says, or None where it cannot be read, or what the stage made is gone."""
        folder = self.stage(stage)
        if not (folder / RESULTS[stage]).is_file():
            return None
        try:
            done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
            return {key: done[key] for key in ("fingerprint", "after")}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None
