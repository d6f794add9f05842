"""What the figures mean, in sentences."""

from typing import Any

from modicum.evaluate.table import FEATURES, WEIGHTS, lines, percent, spelt

FINISH = {
    "propagate": "fitted after the last step to labels propagated over the tuned features",
    "average": "fitted after the last step to the average of its own guesses and labels propagated over the tuned features",
}
WHITENED = "standardised and turned, so that over the training images all directions vary alike; no label takes part"
OVER = {
    "random": "the same network, trained on the same labels alone from random weights",
    "pretrained": "the same network, trained on the same labels alone from the same backbone",
    "all_labels": "the same network with all {known:,} labels",
}


def headline(results: dict[str, Any]) -> list[str]:
    """What the headline says and what it does not."""
    head, images = results["headline"], results["images"]
    told = f"{head['labels']:,} images" + (f" ({images['a_class']} a class)" if images["a_class"] else "")
    told += ", and what the given teacher says" if "teacher" in results["given"] else ""
    if head["accuracy"] is None:
        if not images["test"]:
            first = "There are no test images, so nobody can say how often this classifier is right."
            return [first, *(_refits(results) or _probe(results))]
        return ["There is no classifier to judge yet; below is what the features are worth."]
    low, high = head["interval"]
    right = round(head["accuracy"] * images["test"])
    unseen = "no stage of training has seen"
    if results["given"]:
        unseen = f"this run's training has not seen (what the given {_given(results)} learnt from is not known here)"
    sentences = [
        f"Of {images['test']:,} test images, which {unseen}, the classifier names {right:,} rightly, after being told the class of {told}.",
    ]
    if low < high:
        luck = "seed" if head["labels"] == images["all_labels"] else f"draw of the {head['labels']:,} labels"
        sentences.append(
            f"So of all images like these it names between {percent(low, unit=False)} and {percent(high)} rightly "
            f"(a 95 % interval; more test images would narrow it). Another {luck} moves the figure too; "
            "the command “modicum sweep” shows how far."
        )
    return sentences + _refits(results)


def _refits(results: dict[str, Any]) -> list[str]:
    """What the refits of stage two say: of the training rather than of the classifier that it gave."""
    row = next((row for row in results["rows"] if row["protocol"] == "finetuned_cross_validated"), None)
    if row is None:
        return []
    return [
        f"Cross-validated on the labels: refitted {row['folds']} times, each time without a part of them, stage two rightly names "
        f"{percent(row['top1'])} ({percent(row['low'], unit=False)} to {percent(row['high'], unit=False)}) of the {row['images']:,} images "
        "whose labels were held out from it. It learnt from fewer labels than this classifier.",
        *_unless_it_knew(results),
    ]


def _probe(results: dict[str, Any]) -> list[str]:
    """Without test images: what can be said all the same."""
    row = next((row for row in results["rows"] if row["protocol"] == "linear_cross_validated"), None)
    if row is None:
        return []
    sentences = [
        f"What can be said: a linear probe on {FEATURES[row['features']]}, cross-validated on the labels ({row['folds']}-fold), "
        f"rightly names {percent(row['top1'])} of the labelled images that were held out from it."
    ]
    if alone := row["labels"] - row["images"]:
        sentences.append(f"Of {alone:,} labelled images that are the only ones of their class it says nothing.")
    return sentences + _unless_it_knew(results)


def _given(results: dict[str, Any]) -> str:
    return " and ".join(results["given"])


def _unless_it_knew(results: dict[str, Any]) -> list[str]:
    return [f"If the given {_given(results)} learnt from these labels, the figure is too high."] if results["given"] else []


def gains(results: dict[str, Any]) -> list[str]:
    """The headline against each supervised run of the same network: better, worse, or not to be told apart."""
    sentences = []
    for name, gain in results["gains"].items():
        over = OVER[name].format(known=results["images"]["all_labels"])
        points, low, high = (100 * gain[key] for key in ("difference", "low", "high"))
        if low > 0:
            sentences.append(f"{points:.1f} points above {over} ({low:.1f} to {high:.1f}).")
        elif high < 0:
            sentences.append(f"{-points:.1f} points below {over} ({-high:.1f} to {-low:.1f}).")
        else:
            sentences.append(f"Not to be told apart from {over} (difference {_signed(points)} points, {_signed(low)} to {_signed(high)}).")
    return sentences + better(results)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")


def better(results: dict[str, Any]) -> list[str]:
    """What does better than the headline with the same labels is said beside it, not left for the reader to find."""
    head = results["headline"]["accuracy"]
    if head is None:
        return []
    others = [line for line in lines(results) if line.on_test and not line.headline]
    above = [(line.few.top1, line.what) for line in others if line.few and line.few.top1 > head]
    return [f"With the same labels, {what} reaches more: {percent(top1)}." for top1, what in sorted(above, reverse=True)[:1]]


def facts(results: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what the run was made with."""
    images, pixels = results["images"], results["pixels"]
    one, two = settings["pretrain"], settings["finetune"]
    versions = dict(results["versions"])
    commit, modified = versions.pop("commit", None), versions.pop("modified", False)
    grey = "grey" if pixels["channels"] == 1 else "colour"
    epochs = "epoch" if one["epochs"] == 1 else "epochs"
    stage_one = {
        "pretrain": f"{spelt(results['methods']['pretrain'])}, {one['epochs']:g} {epochs}, {one['batch_size']} images a step"
        + (f", from the weights {one['init']}" if one["init"] else ""),
        "random": "none: random weights",
        "backbone": f"none: the backbone {two['init']}",
    }[results["init"]]
    stage_two = {
        "Stage two": f"{spelt(results['methods']['finetune'])}{_steps(two) if results['takes_steps'] else ''}",
        "Classifier": f"{WEIGHTS[two['export']]}, as finetune.export says; no image has chosen them" if two["export"] in WEIGHTS else "",
        "Its head": FINISH.get(two["finish"], ""),
    }
    listed = [
        ("Data", f"{results['dataset']}: {images['train']:,} training and {images['test']:,} test images, {pixels['size']} pixels, {grey}"),
        ("Labels used", f"{images['labelled']:,} of {images['all_labels']:,} known, draw {results['label_seed']}"),
        ("Seeds", f"seed {results['seed']}, labels {results['label_seed']}, split {results['split_seed']}"),
        ("Backbone", results["backbone"]),
        ("Stage one", stage_one),
        *(stage_two.items() if results["classifier"] else ()),
        ("kNN", f"cosine similarity, votes exp(similarity / {results['knn']['temperature']:g})"),
        ("Whitened features", WHITENED if any(row["protocol"] == "knn_whitened" for row in results["rows"]) else ""),
        ("Linear probe", "logistic regression on standardised features, regularisation chosen on the labels"),
        ("Computed on", results["hardware"]),
        ("Evaluation took", f"{results['seconds']:.0f} s"),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items() if isinstance(number, str))),
        ("Commit", commit + (", with changes that were not committed" if modified else "") if commit else ""),
    ]
    return [(name, value) for name, value in listed if value]


def _steps(two: dict[str, Any]) -> str:
    """How long stage two was, of its settings, and who taught."""
    method, length = two["method"], f"{two['steps']:,} steps"
    rounds = f"{method['rounds']} rounds of {length}" if "rounds" in method else length
    teacher = f", taught by {method['teacher_from']}" if method.get("teacher_from") else ""
    return f", {rounds}, {two['batch_size']} labelled images a step{teacher}"


def plain(text: str) -> str:
    """A text from the data on one line of Markdown: nothing in it is taken for markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))
