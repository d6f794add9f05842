"""bf16 costs no results: the shipped digits run begins as it does in fp32."""

from pathlib import Path

import pytest

from modicum.data.stream import Sample, Stream
from modicum.record import Metrics
from modicum.session import make_request, open_session, run_stage

STEPS = 20


class Enough(Exception):
    """Ends a run that has shown what it should."""


def first_losses(folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    sample = Stream.sample

    def few(stream: Stream, step: int) -> Sample:
        if step == STEPS:
            raise Enough
        return sample(stream, step)

    request = make_request("digits", [f"precision={precision}", "pretrain.log_every=1"], run=folder / precision)
    with monkeypatch.context() as patched, pytest.raises(Enough), open_session(request, quiet=True) as session:
        patched.setattr(Stream, "sample", few)
        run_stage(session, "pretrain")
    return [value for _, name, value in Metrics.read(folder / precision / "pretrain" / "metrics.csv") if name == "loss"]


def test_the_first_losses_in_bf16_are_those_in_fp32_within_two_per_cent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp32 = (first_losses(tmp_path, precision, monkeypatch) for precision in ("bf16", "fp32"))
    assert len(bf16) == len(fp32) == STEPS
    assert bf16 != fp32
    assert bf16 == pytest.approx(fp32, rel=0.02)
