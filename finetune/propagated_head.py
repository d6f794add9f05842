"""A head fitted to labels that were spread over a backbone's features of the training images: before the first step, or after the last."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modicum.checkpoint import Preprocessing
from modicum.data.images import UNKNOWN
from modicum.features import FeatureStore, outputs
from modicum.finetune.propagation import Find, Propagation, aligned
from modicum.neighbours import nearest_others
from modicum.networks import Backbone
from modicum.record import say, working
from modicum.session import Session
from modicum.softmax_regression import FINE, SoftmaxRegression, worthwhile_precision

DECAY = 1e-3  # of the squared weights, beside the mean loss; a tenth or ten times of it moves 0.5 points on digits
ITERATIONS = 100


def propagated_head(
    session: Session, backbone: Backbone, labelled: np.ndarray, how: Propagation, trained: nn.Linear | None = None, name: str = ""
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weight (C, D) and bias (C,) from the labels of the rows `labelled`; test and validation images have no part in it.

    What a head that was `trained` says of the same features counts as much as the labels that are spread. With them, for the record, the
    share of what the head is fitted to that is right where the truth is known. Under a `name` the features are kept for others who ask.
    """
    images, splits = session.images, session.splits["split"]
    rows = np.union1d(labelled, np.flatnonzero(splits.isin(["labelled", "unlabelled"])))
    features, find = features_of(session, backbone, rows, name)
    given = np.where(np.isin(rows, labelled), images.labels[rows], UNKNOWN)
    with working("labels spread over neighbours"):
        targets = how(features.numpy(), given, images.num_classes, find)
        if trained is not None:
            said = F.linear(features, trained.weight.detach().cpu(), trained.bias.detach().cpu()).double().softmax(dim=1)
            targets = (targets + aligned(said.numpy(), how.prior)) / 2
        device = session.hardware.device
        weight, bias = fit_head(features.to(device), torch.from_numpy(targets).float().to(device))  # not every device has float64
    judged = (images.labels[rows] != UNKNOWN) & (given == UNKNOWN)
    if not judged.any():
        return weight, bias, {}
    right = float((targets.argmax(axis=1) == images.labels[rows])[judged].mean())
    say(f"labels propagated to {len(rows) - len(labelled):,} images: {right:.1%} right where the truth is known")
    return weight, bias, {"propagated_label_accuracy": right}


def features_of(session: Session, backbone: Backbone, rows: np.ndarray, name: str) -> tuple[Tensor, Find]:
    """Features float32 (n, D) of training images, in `rows`, and who finds neighbours among them."""
    images, preprocessing = session.images, Preprocessing.of(session.experiment.data)
    if not name:
        return outputs(backbone, images, rows, preprocessing, session.hardware, "features (training images)"), nearest_others
    store = FeatureStore.of(session)
    everyone = store.of_split("train", name, backbone, preprocessing)
    return everyone[np.searchsorted(images.rows("train"), rows)], partial(store.neighbours, name)


def fit_head(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of logistic regression on `features` (N, D) with target probabilities (N, C).

    Solved on standardised features, so that one decay suits every backbone, and stated for the features as they are.
    """
    features = features.to(worthwhile_precision(features))
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    regression = SoftmaxRegression((features - mean) / deviation, targets.to(features), targets.shape[1])
    strength = torch.tensor([1 / (2 * DECAY * len(features))])  # as the regression counts it
    everything = torch.ones(1, len(features), dtype=torch.bool, device=features.device)
    [solution] = regression.solve(strength, everything, FINE[features.dtype], ITERATIONS)
    weight, bias = regression.linear_map(solution)
    found = weight / deviation[:, None]
    return found.T, bias - mean @ found
