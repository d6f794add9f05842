"""The SLURM script under a scheduler of cardboard: fake `sbatch`, `srun`, `scontrol` and `modicum` on the path."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import modicum as package
from modicum import cli

SCRIPT = Path(package.__file__).parent.parent / "pipelines" / "slurm.sbatch"
TASKS = 2

# Reads the script's own options as SLURM does, sends the signal they ask for, and starts the job again when it was put back.
SBATCH = """
import os, re, signal, subprocess, sys, time
from pathlib import Path
options = dict(re.findall(r"^#SBATCH --([\\w-]+)=?(.*)$", Path(sys.argv[1]).read_text(), flags=re.MULTILINE))
to_shell, name, seconds = re.fullmatch(r"(B):(USR1)@(\\d+)", options["signal"]).groups()
number = getattr(signal, "SIG" + os.environ.get("SIGNAL", name))
while True:
    job = subprocess.Popen(["bash", *sys.argv[1:]], env=os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"})
    while job.poll() is None and len(list(Path(".").glob("started.*"))) < 2:
        time.sleep(0.02)
    if job.poll() is None:
        for _ in range(int(os.environ.get("TIMES", "1"))):
            job.send_signal(number)
    status = job.wait()
    if not ("requeue" in options and Path("requeued").exists()):
        sys.exit(status)
    Path("requeued").unlink()
"""
SRUN = """
import os, signal, subprocess, sys
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
signal.signal(signal.SIGTERM, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> calls
case "$1 $2" in
    "show hostnames") printf 'n1\\nn2\\n' ;;
    "show job") echo "   JobState=${STATE:-RUNNING} Reason=None" ;;
    requeue*) touch requeued ;;
esac
"""
MODICUM = """#!/usr/bin/env bash
echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE, $MASTER_ADDR:$MASTER_PORT $(printf '%s|' "$@")" >> calls
[ -z "${FAIL:-}" ] || exit "$FAIL"
[ ! -e "state.$RANK" ] || exit 0
trap 'sleep 0.2; touch "state.$RANK"; rm "started.$RANK"; exit 75' TERM
touch "started.$RANK"
while true; do sleep 0.02; done
"""


def submit(folder: Path, *arguments: str, **environment: str) -> SimpleNamespace:
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "modicum").write_text(MODICUM)
    for program in programs.iterdir():
        program.chmod(0o755)
    done = subprocess.run(
        ["sbatch", str(SCRIPT), *arguments],
        cwd=folder,
        env={"PATH": f"{programs}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return SimpleNamespace(
        status=done.returncode,
        error=done.stderr,
        ranks=sorted(call for call in calls if call.startswith("rank")),
        requeued=calls.count("scontrol requeue 7"),
    )


@pytest.mark.parametrize("environment", [{}, {"SIGNAL": "TERM"}, {"TIMES": "3"}], ids=["time limit", "preemption", "impatience"])
def test_a_job_saves_queues_again_and_ends(tmp_path: Path, environment: dict[str, str]) -> None:
    done = submit(tmp_path, "pretrain", "digits", "--run", "my run", **environment)
    assert (done.status, done.requeued) == (0, 1), done.error
    assert {path.name for path in tmp_path.glob("state.*")} == {"state.0", "state.1"}
    assert done.ranks == sorted(2 * [f"rank {rank} of 2, {rank} of 2, n1:20007 pretrain|digits|--run|my run|" for rank in range(TASKS)])


@pytest.mark.parametrize("status", [1, 2, 130])
def test_any_other_end_is_the_jobs_own(tmp_path: Path, status: int) -> None:
    done = submit(tmp_path, "run", "digits", FAIL=str(status))
    assert (done.status, done.requeued) == (status, 0)


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    done = submit(tmp_path, "run", "digits", SIGNAL="TERM", STATE="COMPLETING")
    assert (done.status, done.requeued) == (75, 0)


def test_usage(tmp_path: Path) -> None:
    done = submit(tmp_path, "run")
    assert (done.status, done.ranks) == (2, [])
    assert "usage" in done.error


def test_the_example_in_its_header_is_accepted() -> None:
    (example,) = re.findall(r"for example +sbatch .*pipelines/slurm\.sbatch (.*)$", SCRIPT.read_text(), flags=re.MULTILINE)
    name, *rest = shlex.split(example)
    assert typer.main.get_command(cli.app).commands[name].make_context(name, rest).params["config"] == "digits"  # type: ignore[attr-defined]
