"""Labels spread over neighbours: against dense float64 formulas, and as a head that knows no test image."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from modicum.data.images import Images
from modicum.errors import InputError
from modicum.finetune.methods.propagate import Propagate
from modicum.finetune.propagated_head import DECAY, fit_head, propagated_head
from modicum.finetune.propagation import SHARPNESS, Kind, Propagation, aligned, neighbour_graph, spread
from modicum.hardware import Hardware
from modicum.method import Facts
from modicum.neighbours import nearest_others
from modicum.networks import create_backbone
from modicum.settings import BackboneSettings, Experiment
from modicum.whitening import whiten


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def clouds(each: int) -> tuple[np.ndarray, np.ndarray]:
    """Three narrow clouds in different directions, and which one each row belongs to."""
    truth = np.repeat(np.arange(3), each)
    return np.eye(3, 5)[truth].astype(np.float32) + 0.1 * features(3 * each, 5), truth


def some_labels(n: int, num_classes: int) -> np.ndarray:
    labels = np.full(n, -1)
    labels[: 2 * num_classes] = np.arange(2 * num_classes) % num_classes
    return labels


@pytest.mark.parametrize(("n", "d", "k"), [(5, 3, 1), (30, 4, 5), (40, 8, 39)])
def test_the_graph_joins_each_image_to_its_nearest(n: int, d: int, k: int) -> None:
    rows = features(n, d)
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    expected = np.zeros((n, n))
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -(unit[i] @ unit[j]))[:k]
        furthest = np.sum((unit[i] - unit[others[-1]]) ** 2)
        for j in others:
            expected[i, j] = np.exp(-4 * np.sum((unit[i] - unit[j]) ** 2) / furthest)
    np.testing.assert_allclose(neighbour_graph(*nearest_others(rows, k)).toarray(), (expected + expected.T) / 2, atol=1e-5)


def test_copies_of_an_image_are_neighbours_like_others() -> None:
    graph = neighbour_graph(*nearest_others(np.repeat(features(4, 3), 10, axis=0), 3))
    assert graph.diagonal().max() == 0
    assert np.isfinite(graph.toarray()).all()
    assert graph.sum(axis=1).min() > 0


@pytest.mark.parametrize(("n", "c"), [(12, 2), (60, 5)])
def test_zhou_is_the_closed_form(n: int, c: int) -> None:
    graph, labels = neighbour_graph(*nearest_others(features(n, 4), 6)), some_labels(n, c)
    weights = graph.toarray()
    root = np.diag(1 / np.sqrt(weights.sum(axis=1)))
    given = np.array([[float(labels[i] == j) for j in range(c)] for i in range(n)])
    expected = (1 - 0.9) * np.linalg.inv(np.eye(n) - 0.9 * root @ weights @ root) @ given
    np.testing.assert_allclose(spread(graph, labels, c, "zhou", 0.9), expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(("n", "c"), [(12, 2), (60, 5)])
def test_poisson_solves_its_equation_with_mean_zero(n: int, c: int) -> None:
    graph, labels = neighbour_graph(*nearest_others(features(n, 4), 6)), some_labels(n, c)
    weights = graph.toarray()
    degrees = weights.sum(axis=1)
    labelled = [i for i in range(n) if labels[i] >= 0]
    mean = np.mean([np.eye(c)[labels[i]] for i in labelled], axis=0)
    right = np.zeros((n, c))
    for i in labelled:
        right[i] = np.eye(c)[labels[i]] - mean
    expected = np.linalg.pinv(np.diag(degrees) - weights) @ right
    expected -= degrees @ expected / degrees.sum()
    np.testing.assert_allclose(spread(graph, labels, c, "poisson"), expected, atol=2e-3 * np.abs(expected).max())


def test_a_path_of_three_in_closed_form() -> None:
    """Middle node joined to both ends, one label at each end: it must be torn equally, the ends must keep their own."""
    from scipy import sparse

    path = sparse.csr_array(np.array([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]))
    scores = spread(path, np.array([0, -1, 1]), 2, "zhou", 0.5)
    # (I - S/2)^-1 e_0 is proportional to (7, 2 sqrt 2, 1)
    np.testing.assert_allclose(scores, [[7 / 8, 1 / 8], [0.5, 0.5], [1 / 8, 7 / 8]], atol=1e-6)
    np.testing.assert_allclose(spread(path, np.array([0, -1, 1]), 2, "poisson"), [[0.5, -0.5], [0, 0], [-0.5, 0.5]], atol=1e-4)


@pytest.mark.parametrize("kind", ["zhou", "poisson"])
def test_one_label_a_cloud_labels_the_cloud(kind: str) -> None:
    rows, truth = clouds(40)
    labels = np.full(120, -1)
    labels[[0, 40, 80]] = [0, 1, 2]
    targets = Propagation(kind, 5)(rows, labels, 3)  # type: ignore[arg-type]
    np.testing.assert_allclose(targets.sum(axis=1), 1)
    assert (targets.argmax(axis=1) == truth).mean() > 0.95


def test_shares_are_sharpened_and_keep_their_order() -> None:
    rows, _ = clouds(20)
    labels = some_labels(60, 3)
    scores = spread(neighbour_graph(*nearest_others(whiten(rows), 10)), labels, 3, "zhou") ** SHARPNESS
    np.testing.assert_allclose(Propagation()(rows, labels, 3), scores / scores.sum(axis=1, keepdims=True))


def test_a_feature_in_another_unit_moves_no_label() -> None:
    rows, _ = clouds(40)
    labels = some_labels(120, 3)
    other = rows * np.array([1, 50, 1, 0.02, 1], dtype=np.float32)
    np.testing.assert_allclose(Propagation()(other, labels, 3), Propagation()(rows, labels, 3), rtol=1e-3)


def test_a_feature_that_no_image_has_is_as_if_it_were_not_there() -> None:
    rows, _ = clouds(40)
    labels = some_labels(120, 3)
    silent = np.concatenate([rows, np.zeros((120, 2), dtype=np.float32)], axis=1)
    np.testing.assert_allclose(Propagation()(silent, labels, 3), Propagation()(rows, labels, 3), rtol=1e-5)


@pytest.mark.parametrize("prior", [(0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1)])
def test_aligned_shares_have_the_classes_as_often_as_they_should(prior: tuple[float, ...]) -> None:
    scores = np.exp(features(500, 4) + np.arange(4))
    shares = aligned(scores, prior)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(shares.mean(axis=0), prior, atol=1e-6)
    factors = shares / scores  # of an image and of a class, and nothing else
    np.testing.assert_allclose(factors / factors[:, :1], np.tile(factors[0] / factors[0, 0], (500, 1)))


def test_without_a_prior_nothing_is_aligned() -> None:
    scores = np.exp(features(50, 4))
    np.testing.assert_allclose(aligned(scores, None), scores / scores.sum(axis=1, keepdims=True))


def test_a_part_of_the_graph_without_labels_stays_finite() -> None:
    rows, _ = clouds(40)
    labels = np.full(120, -1)
    labels[[0, 1, 40, 41]] = [0, 0, 1, 1]
    for kind in ("zhou", "poisson"):
        assert np.isfinite(spread(neighbour_graph(*nearest_others(rows, 5)), labels, 3, kind)).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["zhou", "poisson"])
def test_images_that_no_label_reaches_are_of_no_class(kind: Kind) -> None:
    apart = np.repeat([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 20, axis=0) + 0.01 * features(60, 3)
    labels = np.full(60, -1)
    labels[[0, 1, 20, 21]] = [0, 0, 1, 1]
    targets = Propagation(kind, neighbours=5)(apart, labels, 3)
    assert targets[:40].argmax(axis=1).tolist() == [0] * 20 + [1] * 20
    np.testing.assert_allclose(targets[40:], 1 / 3)


def test_the_head_is_the_minimum_of_its_objective() -> None:
    rows, targets = torch.from_numpy(features(50, 6)).double() * 3 + 1, torch.from_numpy(features(50, 4, 1)).double().softmax(dim=1)
    weight, bias = fit_head(rows, targets)
    deviation = rows.std(dim=0, correction=0)
    weight.requires_grad_(), bias.requires_grad_()
    total = 0.0
    for i in range(50):
        total -= (targets[i] * F.log_softmax(weight @ rows[i] + bias, dim=0)).sum() / 50
    (total + DECAY * (weight * deviation).square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4


class Cardboard:
    """As much of a session as a warm start reads: 90 images of three bright corners, 30 of them test."""

    def __init__(self, spoil: int | None = None) -> None:
        truth = np.arange(90) % 3
        pixels = torch.randint(0, 60, (90, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        for number, corner in enumerate(((0, 0), (0, 8), (8, 0))):
            pixels[truth == number, :, corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] += 180
        if spoil is not None:
            pixels[60:] = spoil
        split = np.array(["labelled"] * 6 + ["unlabelled"] * 54 + ["test"] * 30)
        paths = [f"{row}.png" for row in range(90)]
        official = np.where(split == "test", "test", "train")
        manifest = pd.DataFrame({"id": paths, "path": paths, "label": truth, "split": official})
        self.images = Images("corners", pixels, manifest, ("a", "b", "c"), False)
        self.splits = pd.DataFrame({"label": truth, "split": split})
        data = {"image_size": 16, "channels": 1, "mean": [0.3], "std": [0.3], "mirror": False}
        self.experiment = Experiment.model_validate({"data": data})
        self.hardware = Hardware(torch.device("cpu"), "fp32", 1)


def propagated(session: Cardboard) -> tuple[Propagate, dict[str, float]]:
    backbone = create_backbone(BackboneSettings(), 1, 16, seed=0)
    method = Propagate.from_settings(backbone, Facts(60, 3, 16, 10, 4), 0, {})
    assert isinstance(method, Propagate)
    weight, bias, figures = propagated_head(session, method.student.backbone, np.arange(6), method.how)  # type: ignore[arg-type]
    method.start_head(weight, bias)
    return method, figures


def test_the_head_of_propagated_labels_judges_new_images() -> None:
    session = Cardboard()
    method, figures = propagated(session)
    assert figures["propagated_label_accuracy"] > 0.9
    with torch.no_grad():
        guesses = method.average.network.eval()((session.images.pixels[60:] / 255 - 0.3) / 0.3).argmax(dim=1)
    assert (guesses.numpy() == session.images.labels[60:]).mean() > 0.9
    for mine, theirs in zip(method.student.head.parameters(), method.average.network.head.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_trained_head_counts_as_much_as_the_labels_that_are_spread() -> None:
    session, rows = Cardboard(), np.arange(6)
    backbone = create_backbone(BackboneSettings(), 1, 16, seed=0)
    certain = torch.nn.Linear(backbone.num_features, 3)
    torch.nn.init.zeros_(certain.weight)
    certain.bias.data = torch.tensor([50.0, 0, 0])  # always the first class
    (weight, bias, _), (alone, alone_bias, _) = (propagated_head(session, backbone, rows, Propagation(), head) for head in (certain, None))  # type: ignore[arg-type]
    with torch.no_grad():
        features = backbone.eval()((session.images.pixels[:60] / 255 - 0.3) / 0.3).double()
    mixed, spread_alone = (features @ w.T + b for w, b in ((weight, bias), (alone, alone_bias)))
    first = mixed.softmax(dim=1)[:, 0]
    expected = (1 + spread_alone.softmax(dim=1)[:, 0]) / 2
    np.testing.assert_allclose(first.mean(), expected.mean(), atol=0.02)


def test_test_images_have_no_part_in_it_and_it_repeats_itself() -> None:
    first, again, other = (propagated(session)[0].student.head.weight for session in (Cardboard(), Cardboard(), Cardboard(spoil=255)))
    assert torch.equal(first, again)
    assert torch.equal(first, other)


def test_a_handful_of_images_are_all_neighbours() -> None:
    rows, truth = clouds(2)
    rows = rows[:, :3]  # the others are noise, and among six images as loud as these
    targets = Propagation(neighbours=10)(rows, np.where(np.arange(6) % 2, -1, truth), 3)
    assert targets.argmax(axis=1).tolist() == truth.tolist()


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(InputError, match="choose fewer"):
        Propagate.decide({"neighbours": 60}, Facts(60, 3, 16, 10, 4))


def test_poisson_learning_has_no_shares_to_align() -> None:
    with pytest.raises(InputError, match="poisson names classes"):
        Propagate.decide({"neighbours": 10, "kind": "poisson", "distribution_alignment": "uniform"}, Facts(60, 3, 16, 10, 4))
