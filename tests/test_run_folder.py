"""A run folder belongs to one experiment and one process, and nothing in it is lost or overwritten unasked."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import modicum as package
from modicum.errors import InputError
from modicum.run_folder import RESULTS, RunFolder, depends

CHECKOUT = Path(package.__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@contextmanager
def holder(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder locked."""
    code = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "import pathlib, time\nfrom modicum.run_folder import RunFolder\n"
        f"with RunFolder(pathlib.Path({str(folder.path)!r})).lock():\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused(folder: RunFolder) -> None:
    with holder(folder) as process, pytest.raises(InputError, match=f"in use by another process .process {process.pid} "), folder.lock():
        pass


def test_a_killed_process_does_not_refuse(folder: RunFolder) -> None:
    with holder(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with folder.lock():
            pass


def test_the_second_of_two_locks_in_one_process_is_refused(folder: RunFolder) -> None:
    with folder.lock(), pytest.raises(InputError, match="in use"), folder.lock():
        pass


def test_half_written_files_of_a_killed_process_are_swept(folder: RunFolder) -> None:
    folder.stage("pretrain").mkdir(parents=True)
    (folder.stage("pretrain") / ".state.pt.4711.tmp").write_text("half")
    (folder.path / "notes.tmp").write_text("not ours")
    with folder.lock():
        assert not (folder.stage("pretrain") / ".state.pt.4711.tmp").exists()
        assert (folder.path / "notes.tmp").exists()


def test_a_kill_while_clearing_leaves_no_half_of_a_stage(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = folder.stage("pretrain") / "backbone"
    backbone.mkdir(parents=True)
    (backbone / "model.safetensors").write_text("weights")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(shutil, "rmtree", interrupt)
        folder.clear(["pretrain"])
    assert not folder.stage("pretrain").exists()
    with folder.lock():
        assert [entry.name for entry in folder.path.iterdir()] == [".lock"]


def interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"no run folder: it holds 'letter.txt'"):
        RunFolder(tmp_path).exists()
    with pytest.raises(InputError, match="is a file"):
        RunFolder(tmp_path / "letter.txt").exists()
    with pytest.raises(InputError, match="cannot be made"), RunFolder(tmp_path / "letter.txt" / "run").lock():
        pass


@pytest.mark.parametrize(
    ("key", "init", "stages"),
    [
        ("seed", "pretrain", "pretrain finetune evaluate"),
        ("data.image_size", "random", "pretrain finetune evaluate"),
        ("inputs.data", "pretrain", "pretrain finetune evaluate"),
        ("pretrain.epochs", "pretrain", "pretrain finetune evaluate"),
        ("pretrain.epochs", "random", "pretrain"),
        ("pretrain.epochs", "/some/backbone", "pretrain"),
        ("finetune.labels", "pretrain", "finetune evaluate"),
        ("inputs.finetune.init", "/some/backbone", "finetune evaluate"),
        ("evaluate.bootstrap", "pretrain", "evaluate"),
        ("evaluate.cross_validate", "pretrain", "finetune evaluate"),
        ("evaluate.gallery_queries", "pretrain", ""),
        ("pretrain.log_every", "pretrain", ""),
    ],
)
def test_what_depends_on_a_setting(key: str, init: str, stages: str) -> None:
    assert [stage for stage in ("pretrain", "finetune", "evaluate") if depends(stage, key, init)] == stages.split()


def make_results(folder: RunFolder) -> None:
    for stage in ("finetune", "evaluate"):
        result = folder.stage(stage) / RESULTS[stage]
        result.parent.mkdir(parents=True)
        result.touch()


@pytest.mark.parametrize("content", ["", "[]", '{"fingerprint": "settings"}', '{"fing'])
def test_a_stage_whose_word_or_result_is_gone_is_not_done(folder: RunFolder, content: str) -> None:
    make_results(folder)
    folder.mark_done("finetune", "settings")
    whole = (folder.stage("finetune") / "done.json").read_text()
    (folder.stage("finetune") / "done.json").write_text(content)
    assert not folder.done("finetune", "settings")
    (folder.stage("finetune") / "done.json").write_text(whole)
    assert folder.done("finetune", "settings")
    (folder.stage("finetune") / RESULTS["finetune"]).unlink()
    assert not folder.done("finetune", "settings")


def test_done_means_these_settings_and_the_stages_before(folder: RunFolder) -> None:
    make_results(folder)
    assert not folder.finished("evaluate")
    folder.mark_done("evaluate", "settings")
    assert folder.done("evaluate", "settings")
    assert not folder.done("evaluate", "other settings")
    folder.mark_done("finetune", "settings")
    assert not folder.finished("evaluate")  # it has not seen the classifier
