"""Imports run one way: libraries <- modicum <- stages (never each other) <- pipelines. And what must be quick imports nothing heavy."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import modicum
from modicum.files import write_atomically
from modicum.run_folder import RESULTS, STAGES
from modicum.session import make_request

CHECKOUT = Path(modicum.__file__).parent.parent
ABOVE = {"pretrain", "finetune", "evaluate", "pipelines"}
ALLOWED = {"modicum": set(), "configs": set(), **{stage: {stage} for stage in STAGES}, "pipelines": ABOVE}
HEAVY = {"torch", "torchvision", "timm", "sklearn", "faiss", "pandas"}


def source_files(floor: str) -> list[Path]:
    return sorted((CHECKOUT / floor).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_run_one_way(floor: str) -> None:
    files = source_files(floor)
    assert files
    wrong = []
    for path in files:
        for name in imported_modules(path):
            top, _, rest = name.partition(".")
            assert top not in ALLOWED.keys() - {"modicum"}, f"{path} imports {name}: write modicum.{name}"
            wanted = rest.partition(".")[0]
            if top == "modicum" and wanted in ABOVE - ALLOWED[floor]:
                wrong.append(f"{path.relative_to(CHECKOUT)} imports {name}")
    assert wrong == []


def run_python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys\nsys.path.insert(0, {str(CHECKOUT)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTED_BY = """
from modicum.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    print("status", ended.code)
print("imported", *sorted({heavy!r} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (["--help"], ["run", "--help"], ["sweep", "--help"], ["config", "--schema"]):
        last = run_python(IMPORTED_BY.format(arguments=arguments, heavy=HEAVY), tmp_path).splitlines()[-2:]
        assert [line.strip() for line in last] in (["status 0", "imported"], ["status None", "imported"]), arguments


def test_a_finished_run_is_told_without_torch(tmp_path: Path, write_results: Callable[[Path, float], None]) -> None:
    request = make_request("digits", run=tmp_path / "run")
    for stage in STAGES:
        result = request.folder.stage(stage) / RESULTS[stage]
        result.parent.mkdir(parents=True)
        result.touch()
    request.folder.record(request.experiment.model_dump(mode="json"), {"inputs": request.inputs})
    write_results(request.folder.stage("evaluate") / "results.json", 0.98)
    for stage in STAGES:
        request.folder.mark_done(stage, request.fingerprint(stage), request.stages)
    output = run_python(IMPORTED_BY.format(arguments=["run", "digits", "--run", "run"], heavy=HEAVY), tmp_path)
    assert "98.0 %" in output
    assert "run/report.html" in output
    assert output.splitlines()[-2:] in (["status 0", "imported"], ["status 0", "imported "])


def test_every_package_is_found_by_the_build() -> None:
    """A folder of modules without __init__.py would be left out of a wheel in silence."""
    for floor in ALLOWED:
        missing = {path.parent for path in source_files(floor) if not (path.parent / "__init__.py").is_file()}
        assert missing == set()


def test_the_two_lists_of_dependencies_agree() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (CHECKOUT / "requirements.txt").read_text(encoding="utf-8").split() == [*project["dependencies"], "-e", "."]


def test_no_source_file_is_long() -> None:
    long = [
        f"{path}: {count} lines" for floor in ALLOWED for path in source_files(floor) if (count := len(path.read_text().splitlines())) > 300
    ]
    assert long == []


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "first")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
