"""Where Modicum can be called from: a bare checkout, and plain shell."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import modicum as package

CHECKOUT = Path(package.__file__).parent.parent


@pytest.mark.parametrize("module", ["modicum", "modicum.cli", "pipelines", "pretrain", "finetune", "evaluate"])
def test_python_m_in_a_bare_checkout(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "modicum" in done.stdout


def shell(script: str, folder: Path, *arguments: str, **environment: str) -> SimpleNamespace:
    """Runs a pipeline with a `modicum` on the path that only writes down its arguments."""
    fake = folder / "bin" / "modicum"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s|" "$@" >> calls\necho >> calls\n[ "$1" != "$FAIL" ] || exit 75\n')
    fake.chmod(0o755)
    (folder / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(CHECKOUT / "pipelines" / script), *arguments],
        cwd=folder,
        env={"PATH": f"{fake.parent}:{os.environ['PATH']}"} | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    calls = [line.split("|")[:-1] for line in (folder / "calls").read_text().splitlines()] if (folder / "calls").exists() else []
    return SimpleNamespace(status=done.returncode, calls=calls, error=done.stderr)


def test_digits_as_plain_shell(tmp_path: Path) -> None:
    done = shell("digits.sh", tmp_path, "--run", "my run", "seed=1")
    assert done.status == 0
    assert done.calls == [[stage, "digits", "--run", "my run", "seed=1"] for stage in ("pretrain", "finetune", "evaluate")]


def test_shell_stops_where_a_stage_stops(tmp_path: Path) -> None:
    done = shell("digits.sh", tmp_path, FAIL="finetune")
    assert done.status == 75
    assert [call[0] for call in done.calls] == ["pretrain", "finetune"]


def test_folder_as_plain_shell(tmp_path: Path) -> None:
    done = shell("folder.sh", tmp_path, "my photos", "data.labels=my labels.csv")
    assert done.calls == [
        [stage, "folder", "data.root=my photos", "data.labels=my labels.csv"] for stage in ("pretrain", "finetune", "evaluate")
    ]
    without = shell("folder.sh", tmp_path)
    assert (without.status, without.calls) == (2, [])
    assert "usage" in without.error


def test_fashion_mnist_as_plain_shell_pretrains_once(tmp_path: Path) -> None:
    done = shell("fashion_mnist.sh", tmp_path, "seed=1", RUNS="out")
    assert done.status == 0
    assert done.calls[:2] == [[stage, "fashion_mnist", "--run", "out/fashion_mnist", "seed=1"] for stage in ("pretrain", "evaluate")]
    start = ["--init", "out/fashion_mnist/pretrain/backbone"]
    more, many = ([f"finetune.steps={steps}", "finetune.backbone_lr_scale=1"] for steps in (600, 2000))
    assert done.calls[2:] == [
        [stage, "fashion_mnist", "--run", f"out/fashion_mnist-{labels}", *start, f"finetune.labels={labels}", *longer, "seed=1"]
        for labels, longer in ((40, []), (100, []), (250, more), (1000, many))
        for stage in ("finetune", "evaluate")
    ]
