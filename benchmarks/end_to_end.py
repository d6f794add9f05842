"""From nothing to an accuracy on 40 labels, stage by stage. `python -m benchmarks end_to_end [key=value ...]`

Measured: seconds of each stage of `modicum run fashion_mnist` in a folder of its own, started as a user starts it, and the accuracy that
it ends with. A stage's time runs from the end of the one before, as the run folder records it, so that the first holds the start and the
reading of the images. It takes about an hour on two cores and is left out unless it is named. Nothing is compared: the peers chain nothing.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.pairs import Row, Skipped
from modicum.run_folder import STAGES

SMALL = (
    "pretrain.epochs=1",
    "pretrain.warmup_epochs=0",
    "finetune.steps=4",
    "finetune.warmup_steps=0",
    "finetune.baselines=[]",
    "evaluate.bootstrap=10",
)


def run(quick: bool, overrides: Sequence[str] = ()) -> Iterator[Row]:
    config = "digits" if quick else "fashion_mnist"
    changes = [*(SMALL if quick else ()), *overrides]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        began = time.time()
        done = subprocess.run([sys.executable, "-m", "modicum", "run", config, "--run", str(folder), *changes], check=False)
        if done.returncode:
            raise Skipped(f"modicum run {config} ended with status {done.returncode}.")
        ends = [(folder / stage / "done.json").stat().st_mtime for stage in STAGES]
        headline = json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))["headline"]
    setting = " ".join([config, *changes])
    for stage, start, end in zip(STAGES, [began, *ends], ends, strict=False):
        yield Row("end_to_end", f"{setting}, {stage}", "ours", end - start, end - start, "s")
    yield Row("end_to_end", f"{setting}, all", "ours", ends[-1] - began, ends[-1] - began, "s")
    accuracy = 100 * headline["accuracy"]
    yield Row("end_to_end", f"{setting}, accuracy on {headline['labels']} labels", "ours", accuracy, accuracy, "%")
