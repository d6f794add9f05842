"""The table that a person understands at once: from results.json to the terminal, to Markdown and to the report.

Imports nothing heavy: a finished run prints it at once.
"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

BEST_K = 20
SPELT = {"moco_v1": "MoCo v1", "moco_v2": "MoCo v2", "moco_v3": "MoCo v3", "simclr": "SimCLR", "simclr_v2": "SimCLR v2", "byol": "BYOL"}
SPELT |= {"fixmatch": "FixMatch", "mean_teacher": "Mean Teacher", "supervised": "supervised training", "dino": "DINO", "vicreg": "VICReg"}
WEIGHTS = {
    "student": "last weights (student)",
    "ema": "averaged weights (EMA)",
    "eman": "averaged weights and norm statistics (EMAN)",
}
FEATURES = {
    "pretrained": "pretrained features",
    "finetuned": "fine-tuned features",
    "random": "a random encoder",
    "pixels": "raw pixels",
}


@dataclass(frozen=True)
class Cell:
    top1: float
    low: float
    high: float
    note: str = ""  # such as "k 10"

    def __str__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"{percent(self.top1)} ({percent(self.low, unit=False)} to {percent(self.high, unit=False)}{note})"


@dataclass(frozen=True)
class Line:
    """One line of the table: what was done, with the run's labels and with all labels."""

    what: str
    few: Cell | None
    all: Cell | None
    headline: bool = False
    on_test: bool = True  # else judged on labelled images that were held out, which is another question


def percent(fraction: float, *, unit: bool = True) -> str:
    return f"{100 * fraction:.1f}" + (" %" if unit else "")


def spelt(method: str) -> str:
    return SPELT.get(method, method.replace("_", " "))


def lines(results: dict[str, Any]) -> list[Line]:
    """The lines of the table, the run's own first, in the order of DESIGN: what was trained, then probes, then raw pixels."""
    few, known = results["images"]["labelled"], results["images"]["all_labels"]
    table = _Lines(results["rows"], few, known)
    method, start = spelt(results["methods"]["finetune"]), results["init"]
    first = {
        "pretrain": f"Modicum: pretrained ({spelt(results['methods']['pretrain'])}), then {method}",
        "random": f"Modicum: {method} from random weights",
        "backbone": f"Modicum: {method} from a given backbone",
    }[start]
    table.add(first, headline=True, protocol="finetuned")
    table.add(f"{first}, cross-validated on the labels", protocol="finetuned_cross_validated")
    head = ", head as trained" if results.get("finish", "none") != "none" else ""
    for weights, words in WEIGHTS.items():
        table.add(f"the same training's {words}{head}", protocol="finetuned_weights", weights=weights)
    table.add("same network, supervised, from random weights", protocol="supervised", features="random")
    table.add("same network, supervised, from the backbone", protocol="supervised", features="pretrained")
    for features, words in FEATURES.items():
        regression = "logistic regression" if features == "pixels" else "linear probe"
        table.add(f"{regression} on {words}", protocol="linear", features=features)
        table.add(f"{regression} on {words}, cross-validated on the labels", protocol="linear_cross_validated", features=features)
        if features != "random":
            table.add_knn(words, "knn", features)
            table.add_knn(f"{words}, whitened", "knn_whitened", features)
    return table.made


class _Lines:
    def __init__(self, rows: list[dict[str, Any]], few: int, known: int) -> None:
        self.rows, self.few, self.known = rows, few, known
        self.made: list[Line] = []

    def find(self, labels: int, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["labels"] == labels and all(row[key] == value for key, value in wanted.items())]

    def add(self, what: str, *, headline: bool = False, **wanted: Any) -> None:
        on_test = not wanted["protocol"].endswith("cross_validated")
        self._append(what, *(self.find(labels, **wanted)[:1] for labels in (self.few, self.known)), headline=headline, on_test=on_test)

    def add_knn(self, words: str, protocol: str, features: str) -> None:
        """The one k that is quoted everywhere: 20, or the largest below it that a tiny bank holds."""
        best = []
        for labels in (self.few, self.known):
            rows = [row for row in self.find(labels, protocol=protocol, features=features) if row["k"] <= BEST_K]
            best.append(sorted(rows, key=lambda row: row["k"])[-1:])
        ks = sorted({row["k"] for rows in best for row in rows})
        if len(ks) == 1:
            self._append(f"kNN (k {ks[0]}) on {words}", *best)
        else:
            self._append(f"kNN on {words}", *best, show_k=True)

    def _append(
        self,
        what: str,
        few: list[dict[str, Any]],
        known: list[dict[str, Any]],
        *,
        headline: bool = False,
        on_test: bool = True,
        show_k: bool = False,
    ) -> None:
        def cell(rows: list[dict[str, Any]]) -> Cell | None:
            return Cell(rows[0]["top1"], rows[0]["low"], rows[0]["high"], f"k {rows[0]['k']}" if show_k else "") if rows else None

        line = Line(what, cell(few), cell(known) if self.few != self.known else None, headline, on_test)
        if line.few or line.all:
            self.made.append(line)


def columns(results: dict[str, Any]) -> list[str]:
    """The heads of the one or two columns of figures."""
    few, known = results["images"]["labelled"], results["images"]["all_labels"]
    if few == known:
        return [f"with all {known:,} labels"]
    whole = any(row["labels"] == known for row in results["rows"])
    return [f"with {few:,} labels", *([f"with all {known:,} labels"] if whole else [])]


def title(results: dict[str, Any]) -> str:
    test = results["images"]["test"]
    without = "no test images" + (", so accuracy cross-validated on the labels" if results["rows"] else "")
    judged = f"accuracy on {test:,} test images" if test else without
    return f"{results['dataset']}, {len(results['class_names'])} classes: {judged}"


def caption(results: dict[str, Any]) -> list[str]:
    """What has to be said under the table, a sentence each."""
    return [*([interval_means(results)] if results["rows"] else []), *_certain(results), *results["notes"]]


def _certain(results: dict[str, Any]) -> list[str]:
    if not any(row["top1"] in (0, 1) and row["low"] == row["high"] for row in results["rows"]):
        return []
    return ["An interval without width says that every image judged was named rightly, or none; more images would show a width."]


def interval_means(results: dict[str, Any]) -> str:
    return f"In brackets: 95 % bootstrap interval over the {judged_images(results)}."


def judged_images(results: dict[str, Any]) -> str:
    """What the intervals are drawn over."""
    if not results["images"]["test"]:
        return "labelled images"
    refitted = any(row["protocol"] == "finetuned_cross_validated" for row in results["rows"])
    return "test images" + (", of the cross-validated figure over the labelled ones" if refitted else "")


def results_table(results: dict[str, Any]) -> Table:
    """The table for the terminal, from the content of results.json."""
    table = Table(title=Text(title(results)), caption=Text("\n".join(caption(results))), caption_justify="left", title_justify="left")
    table.add_column("")
    heads = columns(results)
    for head in heads:
        table.add_column(Text(head), justify="right")
    for line in lines(results):
        style = "bold green" if line.headline else ""
        cells = [Text(str(cell) if cell else "") for cell in (line.few, line.all)[: len(heads)]]
        table.add_row(Text(line.what), *cells, style=style)
    return table


def results_markdown(results: dict[str, Any]) -> str:
    """The same table in Markdown, for report.md and pull requests."""
    heads = columns(results)
    rows = [["", *heads], ["---", *["---:"] * len(heads)]]
    for line in lines(results):
        bold = "**" if line.headline else ""
        rows.append([f"{bold}{text}{bold}" if text else "" for text in (line.what, *map(_cell, (line.few, line.all)[: len(heads)]))])
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *(f"{sentence}  " for sentence in caption(results)), ""])


def _cell(cell: Cell | None) -> str:
    return str(cell) if cell else ""
