"""RUN/report.html and RUN/report.md: what a run shows a person."""

from modicum.evaluate.report.page import write_report
from modicum.evaluate.report.pictures import Picture, Pictures

__all__ = ["Picture", "Pictures", "write_report"]
