"""Stage three on a run folder as stages one and two leave it: the files it writes, the table, the report."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from sklearn.datasets import load_digits

from modicum.checkpoint import Preprocessing, load_classifier, save_backbone, save_classifier
from modicum.config import load_experiment
from modicum.data.images import Images
from modicum.evaluate.report import Pictures
from modicum.evaluate.report.charts import Series, heat_map, line_chart, thin, ticks
from modicum.evaluate.report.curves import learning_charts
from modicum.evaluate.report.page import commands, markdown, render
from modicum.evaluate.report.words import better, facts, headline
from modicum.evaluate.results import given
from modicum.evaluate.run import run
from modicum.evaluate.table import results_markdown, results_table
from modicum.hardware import Hardware
from modicum.networks import Classifier, create_backbone
from modicum.run_folder import RunFolder
from modicum.settings import Experiment

EVIL = "<script>alert('x')</script>"
SECTIONS = ["headline", "results", "learning", "knn", "errors", "gallery", "used", "repeat", "load"]
SETTINGS = {
    "data": {"name": "digits", "image_size": 8, "channels": 1, "mean": [0.3], "std": [0.3], "mirror": False},
    "evaluate": {"bootstrap": 100, "gallery_queries": 4, "gallery_neighbours": 3, "linear": {"strengths": [0.01, 1.0]}},
}


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in {"meta", "img", "link", "br"}:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in {"src", "href", "srcset", "data", "xlink:href", "action"} or name.startswith("on"):
                self.sources.append(value)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def session_of(folder, splits, class_names, *, stages=("pretrain", "finetune"), init="pretrain"):
    """A session on 300 digits with untrained networks in the places of the trained ones."""
    pixels, labels = load_digits(return_X_y=True)
    splits = np.asarray(splits)
    pixels, labels = pixels[: len(splits)], labels[: len(splits)]
    if not class_names:
        labels = np.full(len(splits), -1)
    paths = [f"digits/{at}&{EVIL if at == 0 else ''}.png" for at in range(len(splits))]
    manifest = pd.DataFrame({"id": paths, "path": paths, "label": labels, "split": np.where(splits == "test", "test", "train")})
    images = Images("digits", torch.from_numpy(pixels.reshape(-1, 1, 8, 8) * 15.9).byte(), manifest, class_names, False)
    experiment = Experiment.model_validate({**SETTINGS, "finetune": {"labels": 40, "init": init, "finish": "propagate"}})
    run_folder = RunFolder(folder)
    backbone = create_backbone(experiment.backbone, 1, 8, seed=1)
    preprocessing = Preprocessing.of(experiment.data)
    for stage in ("pretrain", "finetune", "evaluate"):
        run_folder.stage(stage).mkdir(parents=True)
    if "pretrain" in stages:
        save_backbone(run_folder.stage("pretrain") / "backbone", backbone, preprocessing)
        rows = "".join(f"{step},{name},{1 / step}\n" for step in range(20, 800, 20) for name in ("loss", "knn", "lr"))
        (run_folder.stage("pretrain") / "metrics.csv").write_text("step,name,value\n" + rows + "800,loss,nan\n")
    if "finetune" in stages:
        save_backbone(run_folder.stage("finetune") / "backbone", backbone, preprocessing)
        for place in (".", "baselines/random", "baselines/all_labels"):
            classifier = Classifier(backbone, len(class_names))
            save_classifier(run_folder.stage("finetune") / place / "classifier", classifier, preprocessing, class_names)
        save_classifier(
            run_folder.stage("finetune") / "weights" / "student", Classifier(backbone, len(class_names)), preprocessing, class_names
        )
        text = "step,name,value\n20,share_above_threshold,0.5\n20,loss,1\n20,loss/labelled,1\n20,loss/unlabelled,0\n40,loss,0.5\n"
        (run_folder.stage("finetune") / "metrics.csv").write_text(text)
    table = manifest.assign(split=splits)
    hardware = Hardware(torch.device("cpu"), "fp32", 1)
    everything = {"name": "digits", "requested": experiment, "experiment": experiment, "images": images, "splits": table}
    return SimpleNamespace(**everything, folder=run_folder, hardware=hardware, request=SimpleNamespace(siblings=()))


NAMES = (EVIL, *"123456789")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    run(session_of(folder, ["labelled"] * 40 + ["unlabelled"] * 160 + ["test"] * 100, NAMES))
    return folder, json.loads((folder / "evaluate" / "results.json").read_text())


def test_results_hold_a_row_for_every_protocol_features_and_bank(finished):
    _, results = finished
    found = {(row["protocol"], row["features"], row["labels"]) for row in results["rows"]}
    features = ("pretrained", "finetuned", "random", "pixels")
    expected = {(protocol, name, labels) for protocol in ("knn", "knn_whitened", "linear") for name in features for labels in (40, 200)}
    classifiers = {("finetuned", "finetuned", 40), ("finetuned_weights", "finetuned", 40)}
    assert found == expected | classifiers | {("supervised", "random", 40), ("supervised", "pretrained", 200)}
    assert [row["weights"] for row in results["rows"] if row["protocol"] == "finetuned_weights"] == ["student"]
    for row in results["rows"]:
        assert 0 <= row["low"] <= row["top1"] <= row["high"] <= 1
        assert row["top1"] <= row["top5"] <= 1
        assert row["images"] == 100
    ks = {labels: {row["k"] for row in results["rows"] if row["protocol"] == "knn" and row["labels"] == labels} for labels in (40, 200)}
    assert ks == {40: {1, 5, 10, 20}, 200: {1, 5, 10, 20, 50, 100, 200}}
    assert results["notes"] == ["kNN with k 50, 100, 200 left out: the bank holds 40 images."]


def test_headline_is_the_classifier_on_the_test_images(finished):
    folder, results = finished
    [row] = [row for row in results["rows"] if row["protocol"] == "finetuned"]
    assert results["headline"] == {"accuracy": row["top1"], "interval": [row["low"], row["high"]], "labels": 40}
    confusion = pd.read_csv(folder / "evaluate" / "confusion.csv", index_col=0)
    assert confusion.to_numpy().sum() == 100
    assert np.trace(confusion.to_numpy()) / 100 == pytest.approx(row["top1"])
    assert list(confusion.columns) == list(NAMES)
    assert sum(entry["images"] for entry in results["per_class"]) == 100


def test_results_csv_holds_the_same_rows(finished):
    folder, results = finished
    table = pd.read_csv(folder / "evaluate" / "results.csv", dtype={"k": "Int64"})
    assert len(table) == len(results["rows"])
    for row, (_, other) in zip(results["rows"], table.iterrows(), strict=True):
        for key, value in row.items():
            assert (value is None and pd.isna(other[key])) or other[key] == value


def test_predictions_name_every_image_without_a_label_by_its_class_as_spelt(finished):
    folder, _ = finished
    table = pd.read_csv(folder / "evaluate" / "predictions.csv", dtype=str)
    assert list(table.columns) == ["path", "class", "confidence"]
    assert list(table["path"]) == [f"digits/{at}&.png" for at in range(40, 200)]
    assert set(table["class"]) <= set(NAMES)


def test_neighbours_of_test_images_are_training_images_nearest_first(finished):
    folder, results = finished
    table = pd.read_csv(folder / "evaluate" / "neighbours.csv")
    assert len(table) == 100 * 3
    assert set(table["features"]) == {"pretrained"} == {results["neighbours_features"]}
    assert table["query_id"].str.extract(r"(\d+)")[0].astype(int).min() >= 200
    assert table["neighbour_id"].str.extract(r"(\d+)")[0].astype(int).max() < 200
    assert table.groupby("query_id")["similarity"].is_monotonic_decreasing.all()


def test_evaluating_again_takes_the_features_from_the_disk_and_gives_the_same(finished, monkeypatch, tmp_path):
    folder, results = finished
    session = session_of(tmp_path / "again", ["labelled"] * 40 + ["unlabelled"] * 160 + ["test"] * 100, NAMES)
    session.folder = RunFolder(folder)
    monkeypatch.setattr("modicum.features.outputs", lambda *_: pytest.fail("extracted twice"))
    run(session)
    again = json.loads((folder / "evaluate" / "results.json").read_text())
    assert again["rows"] == results["rows"]


def check_page(text):
    page = Page(text)
    assert page.open == []
    assert page.ids == SECTIONS
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"<code>.*?</code>", "", text, flags=re.DOTALL))
    assert len(text) < 2_000_000
    return page


def test_report_is_one_escaped_file_with_every_section(finished):
    folder, _ = finished
    text = (folder / "report.html").read_text()
    page = check_page(text)
    assert page.tags.count("svg") >= 6
    assert page.tags.count("img") >= 4 * 4
    assert "&lt;script&gt;" in text
    assert EVIL not in text
    assert "nan" not in re.findall(r'(?:points|x|y|cx|cy|width|style)="([^"]*)"', text)


def test_report_md_holds_the_headline_and_the_table(finished):
    folder, results = finished
    text = (folder / "report.md").read_text()
    assert results_markdown(results) in text
    assert f"{100 * results['headline']['accuracy']:.1f} % with 40 labels" in text


def test_report_says_how_to_repeat_the_run(finished):
    folder, results = finished
    assert "data.image_size=8" in results["overrides"]
    line = next(line for line in (folder / "report.md").read_text().splitlines() if line.startswith("modicum run digits --run AGAIN"))
    _, *given = shlex.split(line)
    again = load_experiment("digits", given[4:])
    expected = Experiment.model_validate({**SETTINGS, "finetune": {"labels": 40, "init": "pretrain", "finish": "propagate"}})
    assert again == expected


def shown(results):
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(results_table(results))
    return captured.get()


def test_table_says_in_plain_words_what_was_done(finished):
    _, results = finished
    text = shown(results)
    for words in (
        "Modicum: pretrained (MoCo v2), then FixMatch",
        "the same training's last weights (student), head as trained",
        "same network, supervised, from random weights",
        "same network, supervised, from the backbone",
        "linear probe on pretrained features",
        "kNN (k 20) on pretrained features",
        "linear probe on fine-tuned features",
        "kNN (k 20) on fine-tuned features",
        "linear probe on a random encoder",
        "logistic regression on raw pixels",
        "kNN (k 20) on raw pixels",
        "with 40 labels",
        "with all 200 labels",
        "95 % bootstrap interval",
    ):
        assert words in text
    assert f"{100 * results['headline']['accuracy']:.1f} %" in text


def test_an_interval_is_no_promise_of_another_test(finished):
    """95 % confidence of the accuracy over all images: of other samples as large as this fewer lie within it."""
    folder, results = finished
    low, high = (f"{100 * bound:.1f}" for bound in results["headline"]["interval"])
    assert f"So of all images like these it names between {low} and {high} % rightly" in (folder / "report.md").read_text()


def test_what_a_given_backbone_has_seen_is_not_claimed(finished):
    _, results = finished
    assert "no stage of training has seen" in headline(results)[0]
    assert "given teacher" not in headline(results)[0]
    told = headline({**results, "given": ["backbone", "teacher"]})[0]
    assert "this run's training has not seen (what the given backbone and teacher learnt from is not known here)" in told
    assert told.endswith(", and what the given teacher says.")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, []),
        ({"finetune": {"init": "random"}}, []),
        ({"finetune": {"init": "elsewhere"}}, ["backbone"]),
        ({"pretrain": {"init": "weights.pt"}}, ["starting weights"]),
        ({"pretrain": {"init": "weights.pt"}, "finetune": {"init": "random"}}, []),  # no stage one
        ({"finetune": {"init": "elsewhere", "method": {"name": "distill", "teacher_from": "t"}}}, ["backbone", "teacher"]),
        ({"finetune": {"method": {"name": "distill", "teacher_from": None}}}, []),
    ],
)
def test_what_a_run_was_given_is_named(settings, found):
    assert given(Experiment.model_validate(settings)) == found


def test_what_a_given_backbone_may_know_is_said_beside_a_cross_validated_figure(finished):
    _, results = finished
    row = {"protocol": "finetuned_cross_validated", "folds": 4, "top1": 0.8, "low": 0.7, "high": 0.9, "images": 40}
    told = headline({**results, "rows": [row], "given": ["teacher"]})
    assert told[-1] == "If the given teacher learnt from these labels, the figure is too high."
    assert "too high" not in " ".join(headline({**results, "rows": [row]}))


@pytest.mark.parametrize(
    ("settings", "change", "told"),
    [
        ({"method": "fixmatch"}, {}, "FixMatch, 1,000 steps, 64 labelled images a step"),
        ({"method": "propagate"}, {"takes_steps": False, "methods": {"pretrain": "moco_v2", "finetune": "propagate"}}, "propagate"),
        ({"method": {"name": "fixmatch", "rounds": 3}}, {}, "FixMatch, 3 rounds of 1,000 steps, 64 labelled images a step"),
        ({"method": {"name": "fixmatch", "teacher_from": "t"}}, {}, "FixMatch, 1,000 steps, 64 labelled images a step, taught by t"),
        ({"method": "fixmatch"}, {"classifier": False}, None),
    ],
)
def test_facts_tell_what_stage_two_did(finished, settings, change, told):
    _, results = finished
    experiment = Experiment.model_validate({"finetune": {**settings, "batch_size": 64}})
    assert dict(facts({**results, **change}, experiment.model_dump(mode="json"))).get("Stage two") == told


def test_facts_tell_which_weights_stage_one_began_with(finished):
    _, results = finished
    settings = Experiment.model_validate({"pretrain": {"batch_size": 256, "init": "w.pt"}}).model_dump(mode="json")
    assert dict(facts(results, settings))["Stage one"] == "MoCo v2, 100 epochs, 256 images a step, from the weights w.pt"


def test_a_config_of_ones_own_is_repeated_from_the_run_folder(finished):
    _, results = finished
    again, seeds, _ = commands({**results, "config": None, "overrides": []})
    assert again[1] == "modicum run RUN/experiment.yaml --run AGAIN"
    assert seeds[1] == "modicum sweep RUN/experiment.yaml --seeds 5"


def test_labels_a_class_are_told_where_each_has_as_many(finished):
    _, results = finished
    counts = {**results["images"], "a_class": None}
    assert "(4 a class)" in headline({**results, "images": {**counts, "a_class": 4}})[0]
    assert "a class)" not in headline({**results, "images": counts})[0]


def test_an_interval_without_width_is_told(finished):
    _, results = finished
    assert "without width" not in shown(results)
    perfect = {**results["rows"][0], "top1": 1.0, "low": 1.0, "high": 1.0}
    assert "An interval without width says" in shown({**results, "rows": [perfect, *results["rows"]]})


def test_a_tiny_bank_votes_with_the_k_it_has_and_says_so(finished):
    _, results = finished
    small = {**results, "rows": [row for row in results["rows"] if row["k"] is None or row["labels"] == 200 or row["k"] <= 5]}
    assert ", k 5)" in shown(small)
    assert ", k 20)" in shown(small)


def test_without_test_images_a_cross_validated_probe_stands_in_and_says_so(tmp_path):
    session = session_of(tmp_path / "run", ["labelled"] * 60 + ["unlabelled"] * 60, NAMES)
    run(session)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert results["headline"] == {"accuracy": None, "interval": [None, None], "labels": 60}
    assert {row["protocol"] for row in results["rows"]} == {"linear_cross_validated"}
    # The fine-tuned backbone has seen every label, so it cannot be cross-validated on them.
    assert {row["features"] for row in results["rows"]} == {"pretrained", "random", "pixels"}
    page = (tmp_path / "run" / "report.html").read_text()
    check_page(page)
    assert "no test images" in page
    assert "cross-validated on the labels" in page
    assert "cross-validated on the labels" in shown(results)
    table = pd.read_csv(tmp_path / "run" / "evaluate" / "predictions.csv")
    assert len(table) == 60
    neighbours = pd.read_csv(tmp_path / "run" / "evaluate" / "neighbours.csv")
    assert (neighbours["query_id"] != neighbours["neighbour_id"]).all()


@pytest.mark.parametrize("tests", [0, 60])
def test_refits_are_judged_on_the_labels_they_were_not_told_and_are_no_headline(tmp_path, tests):
    session = session_of(tmp_path / "run", ["labelled"] * 60 + ["unlabelled"] * 60 + ["test"] * tests, NAMES)
    session.splits["refit"] = [at % 2 for at in range(60)] + [-1] * (60 + tests)
    truth = session.images.labels
    for number in (1, 2):  # the first refit names all images class 0, the second class 1
        classifier, preprocessing, _ = load_classifier(tmp_path / "run" / "finetune" / "classifier")
        classifier.head.bias.data[number - 1] = 1e6
        save_classifier(tmp_path / "run" / "finetune" / "refits" / str(number) / "classifier", classifier, preprocessing, NAMES)
    run(session)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    [row] = [row for row in results["rows"] if row["protocol"] == "finetuned_cross_validated"]
    assert row["top1"] == np.mean(truth[:60] == np.arange(60) % 2)
    assert row["low"] < row["top1"] < row["high"]
    assert (row["folds"], row["images"], row["labels"], row["method"]) == (2, 60, 60, "fixmatch")
    flattering = {
        **results,
        "rows": [row | {"top1": 1.0} if row["protocol"].endswith("cross_validated") else row for row in results["rows"]],
    }
    assert "cross-validated" not in " ".join(better(flattering))  # other images, other labels
    assert (results["headline"]["accuracy"] is None) == (tests == 0)
    assert row["top1"] in pd.read_csv(tmp_path / "run" / "evaluate" / "results.csv")["top1"].to_numpy()
    page = (tmp_path / "run" / "report.html").read_text()
    check_page(page)
    assert f"refitted 2 times, each time without a part of them, stage two rightly names {100 * row['top1']:.1f} %" in page
    table = shown(results)
    assert "Modicum: pretrained (MoCo v2), then FixMatch, cross-validated on the labels" in table
    assert "stage two was refitted 2 times" in " ".join(table.split())
    assert ("of the cross-validated figure over the labelled ones" in table) == (tests > 0)


def test_refits_that_are_not_all_there_are_not_judged(tmp_path):
    session = session_of(tmp_path / "run", ["labelled"] * 60 + ["unlabelled"] * 20, NAMES)
    session.splits["refit"] = [at % 2 for at in range(60)] + [-1] * 20
    shutil.copytree(tmp_path / "run" / "finetune" / "classifier", tmp_path / "run" / "finetune" / "refits" / "1" / "classifier")
    run(session)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert {row["protocol"] for row in results["rows"]} == {"linear_cross_validated"}


def test_without_any_label_there_are_galleries_and_no_crash(tmp_path):
    run(session_of(tmp_path / "run", ["unlabelled"] * 30, (), stages=("pretrain",)))
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert results["rows"] == []
    assert results["headline"]["accuracy"] is None
    page = check_page((tmp_path / "run" / "report.html").read_text())
    assert page.tags.count("img") == 4 * 4
    assert "cross-validated on the labels" not in shown(results)
    assert "some class needs two labels" in " ".join(results["notes"])


def test_before_stage_two_the_features_are_judged_and_it_is_said(tmp_path):
    run(session_of(tmp_path / "run", ["labelled"] * 20 + ["unlabelled"] * 20 + ["test"] * 30, NAMES, stages=("pretrain",)))
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert {row["features"] for row in results["rows"]} == {"pretrained", "random", "pixels"}
    assert "Stage two has not run" in " ".join(results["notes"])
    check_page((tmp_path / "run" / "report.html").read_text())


def test_many_classes_are_shown_as_their_worst_pairs(finished, tmp_path):
    _, results = finished
    names = [f"class {at}" for at in range(50)]
    confusion = np.eye(50, dtype=int) * 9
    confusion[3, 7] = 5
    per_class = [{"class": name, "accuracy": at / 50, "images": 9} for at, name in enumerate(names)]
    many = {**results, "class_names": names, "per_class": per_class}
    settings = Experiment.model_validate(SETTINGS).model_dump(mode="json")
    text = render(tmp_path, many, settings, confusion, Pictures())
    check_page(text)
    assert "class 3 taken for class 7: 5 of 14" in text
    assert "The hardest classes" in text
    assert "Who is taken for whom" not in text


def test_what_stage_one_watched_is_drawn_and_a_collapse_is_told(finished, tmp_path):
    _, results = finished
    (tmp_path / "pretrain").mkdir()
    readings = {"knn": (0.25, 0.5), "embedding_std": (0.4, 0.05), "embedding_rank": (9, 1.5), "feature_rank": (30, 2)}
    readings |= {"alignment": (0.3, 0.01), "uniformity": (-0.5, -0.02)}
    rows = [f"{step},{name},{values[at]}\n" for name, values in readings.items() for at, step in enumerate((10, 20))]
    (tmp_path / "pretrain" / "metrics.csv").write_text("step,name,value\n" + "".join(rows))
    settings = Experiment.model_validate(SETTINGS).model_dump(mode="json")
    assert not any("similarities" in chart.title for chart in learning_charts(tmp_path, settings, pretrained=True))

    bins = "".join(f"{step},{low},{low + 0.5},{share},{1 - share}\n" for step in (10, 20) for low, share in ((0.0, 0.25), (0.5, 0.75)))
    (tmp_path / "pretrain" / "similarities.csv").write_text("step,low,high,positives,negatives\n" + bins)
    charts = {chart.title.removeprefix("Pretraining: "): chart.drawing for chart in learning_charts(tmp_path, settings, pretrained=True)}
    assert [drawing.count("<polyline") for drawing in charts.values()] == [1, 2, 1, 2, 4]
    assert list(charts) == [
        "online kNN, %",
        "effective rank",
        "spread of the embeddings",
        "alignment and uniformity",
        "similarities, % of pairs",
    ]
    assert learning_charts(tmp_path, settings, pretrained=False) == []
    assert "| online kNN, % | 25 | 50 |" in markdown(tmp_path, results, settings)

    (tmp_path / "pretrain" / "collapse.json").write_text(json.dumps({"step": 20, "message": f"collapsed {EVIL}"}))
    page = render(tmp_path, results, settings, None, Pictures())
    check_page(page)
    assert '<p class="warning">collapsed &lt;script&gt;' in page
    assert "collapsed \\<script" in markdown(tmp_path, results, settings)
    elsewhere = {**results, "init": "backbone"}  # it started from another run's backbone, whatever the folder holds
    assert "collapsed" not in render(tmp_path, elsewhere, settings, None, Pictures()) + markdown(tmp_path, elsewhere, settings)


def test_charts_hold_every_point_within_the_frame_and_round_ticks():
    drawing = line_chart([Series("a", [(1, 0.9), (10, 0.99)], 0, dots=True)], "k", share=True, log_x=True, label="l")
    places = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)]
    assert len(places) == 2
    assert all(0 < x < 420 and 0 < y < 240 for x, y in places)
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(0.7, 0.7)[0] < 0.7 < ticks(0.7, 0.7)[-1]
    assert ticks(1.0, 1.0, most=1.0)[-1] == 1.0
    assert len(thin([(float(at), 1.0) for at in range(10_000)])) <= 240
    assert line_chart([Series("a", [], 0)], "k", share=True, label="l") == ""
    assert "&lt;script&gt;" in heat_map([[1, 0], [2, 3]], [EVIL, "b"])


def test_neighbours_among_whitened_features_have_their_charts(finished):
    page = (finished[0] / "report.html").read_text()
    assert "kNN among all 200 labels, whitened, %" in page
    assert "Whitened features" in page


def test_whitened_features_are_left_out_where_the_settings_say_so(tmp_path):
    session = session_of(tmp_path / "run", ["labelled"] * 20 + ["unlabelled"] * 20 + ["test"] * 30, NAMES, stages=("pretrain",))
    settings = session.experiment.evaluate
    plain = settings.model_copy(update={"knn": settings.knn.model_copy(update={"whitened": False})})
    session.experiment = session.experiment.model_copy(update={"evaluate": plain})
    run(session)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert {row["protocol"] for row in results["rows"]} == {"knn", "linear"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "kNN among" in page
    assert "labels, whitened" not in page
    assert "Whitened features" not in page


def test_a_large_bank_is_searched_by_an_index_and_the_results_say_so(tmp_path):
    session = session_of(tmp_path / "run", ["labelled"] * 20 + ["unlabelled"] * 20 + ["test"] * 30, NAMES, stages=("pretrain",))
    settings = session.experiment.evaluate
    indexed = settings.model_copy(update={"knn": settings.knn.model_copy(update={"approximate_from": 40})})
    session.experiment = session.experiment.model_copy(update={"evaluate": indexed})
    run(session)
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert [note for note in results["notes"] if "inverted index" in note] == [
        "kNN in the bank of 40 images looked into an inverted index, which may miss a neighbour."
    ]
