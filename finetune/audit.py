"""Are the pseudo-labels right? The truth of benchmarks is used here, for the record alone; no method can reach it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modicum import distributed
from modicum.data.images import UNKNOWN, Images
from modicum.finetune.semi_supervised import Guesses, SemiSupervised
from modicum.loop import Monitor, Reading
from modicum.record import Metrics, say, warn

BINS = 15  # of the calibration error (Guo 2017, arXiv:1706.04599)
NARROW = 3  # epochs in a row whose guesses name few classes; fewer, at the start, are easy classes that count before the others
Figures = dict[str, float]


class Ledger(nn.Module):
    """What each image of the data set was last guessed to be: 20 bytes an image, part of the run's state."""

    guess: Tensor  # int32 (N,)
    earlier: Tensor  # int32 (N,): the guess at the end of the last epoch; -1: none
    step: Tensor  # int32 (N,): of the guess; -1: none yet
    confidence: Tensor  # (N,)
    used: Tensor  # (N,): 0 or 1, or a weight between

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("guess", "earlier", "step"):
            self.register_buffer(name, torch.full((size,), -1, dtype=torch.int32))
        for name in ("confidence", "used"):
            self.register_buffer(name, torch.zeros(size))

    def write(self, guesses: Guesses, step: int) -> None:
        """Takes in the guesses of all ranks."""
        confidence, guess = guesses.probabilities.max(dim=1)
        values = {"guess": guess, "confidence": confidence, "used": guesses.used, "step": torch.full_like(guess, step)}
        rows = distributed.gather(guesses.rows)
        for name, value in values.items():
            kept = self.get_buffer(name)
            kept.index_copy_(0, rows, distributed.gather(value.to(kept.dtype)))

    def since(self, step: int) -> dict[str, np.ndarray]:
        """The entries of the images guessed in step `step` or later, and their rows."""
        rows = torch.nonzero(self.step >= step)[:, 0]
        names = ("guess", "earlier", "confidence", "used")
        return {"rows": rows.cpu().numpy()} | {name: self.get_buffer(name)[rows].cpu().numpy() for name in names}


class Audit:
    """Writes `audit.csv`: the figures of each log interval and of each epoch, over the images guessed in it."""

    def __init__(self, images: Images, labelled: np.ndarray, method: SemiSupervised, folder: Path, device: torch.device) -> None:
        self.method, self.folder, self.names = method, folder, images.class_names
        self.truth = images.labels.copy()
        self.truth[labelled] = UNKNOWN  # a network is right about what it was told
        self.device_truth = torch.tensor(self.truth, device=device)
        self.prior = class_shares(images.labels[labelled], images.num_classes)
        self.ledger = method.ledger = Ledger(len(self.truth)).to(device)
        self.metrics: Metrics | None = None
        self.warned: set[str] = set()
        self.narrow = 0  # epochs in a row whose guesses name few classes

    def observe(self) -> dict[str, Reading]:
        """Takes in the guesses of the step just made. For metrics.csv: numerators and denominators; none without guesses."""
        guesses = self.method.guesses
        if guesses is None:
            return {}
        self.ledger.write(guesses, self.method.progress.step)
        truth = self.device_truth[guesses.rows]
        known = (truth != UNKNOWN).float()
        right = (guesses.probabilities.argmax(dim=1) == truth).float()
        used = guesses.used
        return {
            "share_above_threshold": (used.sum(), count(used)),
            "pseudo_label_accuracy": (right.sum(), known.sum()),
            "pseudo_label_accuracy_above_threshold": ((right * used).sum(), (known * used).sum()),
        }

    def monitors(self, log_every: int, epoch: int) -> list[Monitor]:
        """`epoch`: as many steps as show about every unlabelled image once."""
        return [
            Monitor(log_every, lambda done: self.read("interval", log_every, done)),
            Monitor(epoch, lambda done: self.read("epoch", epoch, done)),
        ]

    def agreement(self, every: int, outputs: Callable[[nn.Module], Tensor]) -> Monitor:
        """The share of the images behind `outputs`, which gives a network's logits (N, C), that student and average name alike."""

        def read(done: int) -> Figures:
            if self.method.guesses is not None:
                student, average = (outputs(self.method.classifier(kind)).argmax(dim=1) for kind in ("student", self.method.average_kind))
                self.write(done, {"agreement": float((student == average).float().mean())})
            return {}

        return Monitor(every, read)

    def read(self, scope: str, every: int, done: int) -> Figures:
        """Writes the figures of the stretch of `every` steps that ends after `done`. Nothing goes into metrics.csv."""
        if self.method.guesses is None:
            return {}
        began = (done - 1) // every * every
        found = self.ledger.since(began)
        truth = self.truth[found["rows"]]
        figures = figures_of(found["guess"], found["confidence"], found["used"], truth, self.prior, self.names)
        if scope == "epoch":
            again = found["earlier"] >= 0
            if again.any():
                figures["flips"] = float((found["guess"] != found["earlier"])[again].mean())
            self.ledger.earlier.copy_(self.ledger.guess)
            self.warn(found, bool((truth != UNKNOWN).any()), began, done)
        self.write(done, {f"{scope}/{name}": value for name, value in figures.items()})
        return {}

    def write(self, done: int, figures: Figures) -> None:
        if self.metrics is None:
            self.metrics = Metrics(self.folder / "audit.csv", resume_step=done - 1)
        self.metrics.write(done, figures)

    def warn(self, found: dict[str, np.ndarray], known: bool, began: int, done: int) -> None:
        """Once a run each: no truth, no guess that counts, guesses that have collapsed onto few classes."""
        if not known and "truth" not in self.warned:
            say("pseudo-label audit: no true label is known beside those given, so it tells shares, classes and flips but no accuracy.")
            self.warned.add("truth")
        used = found["used"] > 0
        if not used.any() and "none" not in self.warned:
            self.warned.add("none")
            warn(
                f"steps {began + 1} to {done}: no guess on an unlabelled image counted (the surest: {found['confidence'].max():.2f}), so "
                "they taught nothing. Lower finetune.method.threshold, or start better: longer pretraining, or "
                "finetune.warm_start=propagate where it is none."
            )
        shares = class_shares(found["guess"][used], len(self.names))
        guessed, given = effective_classes(shares), effective_classes(self.prior)
        many = used.sum() >= max(3 * given, len(used) / 4)  # fewer cannot name all classes, or are of the easy ones that come first
        self.narrow = self.narrow + 1 if many and guessed <= given / 2 else 0
        if self.narrow >= NARROW and "few" not in self.warned:
            self.warned.add("few")
            warn(
                f"steps {began + 1} to {done}, and {NARROW - 1} epochs before: the guesses that count have collapsed onto few classes: "
                f"they are spread as over {guessed:.1f} equal classes, the labels as over {given:.1f}; {shares.max():.0%} name "
                f"{self.names[shares.argmax()]!r}. Set finetune.method.distribution_alignment=uniform, labelled or estimated where the "
                "method has it, or finetune.warm_start=propagate."
            )


def figures_of(
    guess: np.ndarray, confidence: np.ndarray, used: np.ndarray, truth: np.ndarray, prior: np.ndarray, names: tuple[str, ...]
) -> Figures:
    """What can be told of guessed classes (N,): without the truth (-1) shares and classes, with it whether they are right."""
    shares = class_shares(guess, len(names))
    figures = {
        "images": float(len(guess)),
        "share_used": float(used.mean()),
        "confidence": float(confidence.mean()),
        "distance_to_prior": float(np.abs(shares - prior).sum() / 2),
        **{f"share/{name}": float(share) for name, share in zip(names, shares, strict=True)},
        **{f"prior/{name}": float(share) for name, share in zip(names, prior, strict=True)},
    }
    known = truth != UNKNOWN
    if not known.any():
        return figures
    right, used, truth = (guess == truth)[known], used[known], truth[known]
    figures |= {"accuracy": float(right.mean()), "calibration_error": calibration_error(confidence[known], right)}
    if used.any():
        figures["accuracy_used"] = float((right * used).sum() / used.sum())
    for number, name in enumerate(names):
        if (truth == number).any():
            figures[f"accuracy/{name}"] = float(right[truth == number].mean())
        if used[truth == number].any():
            figures[f"accuracy_used/{name}"] = float((right * used)[truth == number].sum() / used[truth == number].sum())
    return figures


def class_shares(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class occurs among `classes` (N,), float64 (C,)."""
    return np.bincount(classes, minlength=num_classes) / max(1, len(classes))


def effective_classes(shares: np.ndarray) -> float:
    """exp(entropy) of shares (C,): as many equally frequent classes are as hard to tell apart, 1 to C."""
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum()))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean over images of |accuracy - mean confidence| of their bin, of BINS equal ones (arXiv:1706.04599, equation 3)."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, right - confidence.astype(np.float64), minlength=BINS)
    return float(np.abs(gaps).sum() / len(right))


def count(values: Tensor) -> Tensor:
    return torch.ones_like(values).sum()
