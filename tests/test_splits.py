"""Label draws and the table of splits."""

import numpy as np
import pandas as pd
import pytest
import torch

from modicum.data.images import Images
from modicum.data.splits import draw_labels, draw_refits, make_splits, write_splits
from modicum.data.stratify import apportion, hold_out, stratified_folds
from modicum.errors import InputError
from modicum.settings import FinetuneSettings


def labels_of(*counts, unknown=0):
    labels = np.concatenate([np.full(count, number) for number, count in enumerate(counts)] + [np.full(unknown, -1)])
    return np.random.default_rng(0).permutation(labels)


def images_of(labels, test=()):
    split = np.full(len(labels), "train", dtype=object)
    split[list(test)] = "test"
    paths = [f"{number:05d}" for number in range(len(labels))]
    manifest = pd.DataFrame({"id": paths, "path": paths, "label": labels, "split": split.astype(str)})
    names = tuple(f"class {number}" for number in range(int(labels.max()) + 1))
    return Images("made", torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), manifest, names, True)


@pytest.mark.parametrize("seed", range(5))
def test_a_class_balanced_draw_is_balanced(seed):
    labels = labels_of(30, 50, 40, unknown=100)
    drawn = draw_labels(labels, 3, 24, seed, "class")
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all()
    assert list(np.bincount(labels[drawn])) == [8, 8, 8]


def test_what_is_left_over_goes_to_random_classes():
    labels = labels_of(30, 50, 40, 30)
    extra = {tuple(np.bincount(labels[draw_labels(labels, 4, 22, seed, "class")])) for seed in range(20)}
    assert all(sorted(counts) == [5, 5, 6, 6] for counts in extra)
    assert len(extra) > 1


def test_the_largest_equal_draw_is_possible_and_one_more_is_not():
    labels = labels_of(3, 9, 5)
    assert len(draw_labels(labels, 3, 11, 0, "class")) == 11
    with pytest.raises(InputError, match=r"'cat' has 3: ask for at most 11, or set finetune.balance=proportional"):
        draw_labels(labels, 3, 12, 0, "class", ["cat", "dog", "cow"])


def test_draws_are_seeded():
    labels = labels_of(30, 50, 40)
    assert np.array_equal(draw_labels(labels, 3, 12, 1, "class"), draw_labels(labels, 3, 12, 1, "class"))
    assert not np.array_equal(draw_labels(labels, 3, 12, 1, "class"), draw_labels(labels, 3, 12, 2, "class"))


@pytest.mark.parametrize(("request_", "count"), [(9, 9), ("10%", 11), ("50%", 56), ("100%", 112), ("all", 112), (112, 112)])
def test_a_proportional_draw_follows_the_classes_and_leaves_none_out(request_, count):
    labels = labels_of(100, 10, 2, unknown=30)
    drawn = draw_labels(labels, 3, request_, 0, "proportional")
    shares = np.bincount(labels[drawn], minlength=3)
    assert len(set(drawn)) == len(drawn) == shares.sum() == count
    assert (shares >= 1).all()
    assert np.abs(shares - count * np.array([100, 10, 2]) / 112).max() <= 2


@pytest.mark.parametrize(
    ("counts", "request_", "balance", "sentence"),
    [
        ((5, 5), 1, "class", "finetune.labels=1 gives 1 labels, fewer than the 2 classes"),
        ((5, 5), "10%", "proportional", "finetune.labels=10% gives 1 labels, fewer than the 2 classes"),
        ((5, 5), 11, "proportional", "asks for more labels than the 10"),
        ((5, 5), "101%", "proportional", "more than all"),
        ((5, 0, 5), "all", "class", "No training image carries the label '1'"),
        ((0, 0), 4, "class", "No training image carries a label"),
        ((2, 5), 6, "class", "asks for 3 labelled images of each class, and '0' has 2"),
    ],
)
def test_an_impossible_draw_is_refused_in_one_sentence(counts, request_, balance, sentence):
    with pytest.raises(InputError) as refused:
        draw_labels(labels_of(*counts, unknown=3), len(counts), request_, 0, balance)
    assert sentence in str(refused.value)


def test_shares_are_exact_within_their_bounds():
    draws = np.random.default_rng(0)
    for _ in range(200):
        counts = draws.integers(1, 30, size=draws.integers(1, 12))
        minimum = np.minimum(1, counts)
        total = int(draws.integers(minimum.sum(), counts.sum() + 1))
        shares = apportion(total, counts, minimum, counts, draws)
        assert shares.sum() == total
        assert (shares >= minimum).all()
        assert (shares <= counts).all()


def test_holding_out_rounds_up_once_and_spares_the_last_of_a_class():
    labels = labels_of(50, 30, 20)
    assert list(np.bincount(labels[hold_out(labels, 0.07, "x", 0)], minlength=3)) in ([4, 2, 1], [3, 2, 2])
    rare = labels_of(50, 1)
    assert 1 not in rare[hold_out(rare, 0.9, "x", 0)]
    with pytest.raises(InputError, match=r"data.test_fraction=0.5 holds out no image"):
        hold_out(labels_of(1, 1), 0.5, "data.test_fraction", 0)


def test_folds_hold_out_every_label_once_and_every_class_evenly():
    labels = np.array([0] * 4 + [1] * 7 + [5])
    folds = stratified_folds(labels, 4, 0)
    assert sorted(folds[:4]) == [0, 1, 2, 3]
    assert np.bincount(folds[4:11]).tolist() == [2, 2, 2, 1]
    assert folds[11] == -1
    assert (folds == stratified_folds(labels, 4, 0)).all()


def test_every_image_has_its_row():
    labels = labels_of(30, 30, unknown=40)
    images = images_of(labels, test=range(20))
    splits = make_splits(images, FinetuneSettings(labels=10))
    assert list(splits.columns) == ["id", "path", "label", "split"]
    assert list(splits["id"]) == list(images.manifest["id"])
    assert list(splits["label"]) == list(labels)
    assert set(splits["split"]) == {"labelled", "unlabelled", "test"}
    assert list(np.flatnonzero(splits["split"] == "test")) == list(range(20))
    labelled = splits[splits["split"] == "labelled"]
    assert list(np.bincount(labelled["label"])) == [5, 5]
    assert (splits.loc[(splits["label"] == -1) & (splits.index >= 20), "split"] == "unlabelled").all()


@pytest.mark.parametrize(("count", "validation"), [(38, 0), (39, 0), (40, 4), (60, 6), ("all", 20)])
def test_validation_starts_at_20_labels_of_each_class(count, validation):
    images = images_of(labels_of(100, 100, unknown=10))
    splits = make_splits(images, FinetuneSettings(labels=count))
    held = splits[splits["split"] == "validation"]
    assert len(held) == validation
    assert splits["split"].isin(["labelled", "validation"]).sum() == (200 if count == "all" else count)
    if validation:
        assert list(np.bincount(held["label"])) == [validation // 2] * 2
    assert not make_splits(images, FinetuneSettings(labels=count, validation_fraction=0))["split"].eq("validation").any()


def test_every_label_to_train_on_is_held_out_from_one_refit_and_no_class_leaves_one():
    images = images_of(labels_of(100, 60, 40, unknown=10), test=range(20))
    splits = make_splits(images, FinetuneSettings(labels=90), num_refits=4)
    assert set(splits["split"]) == {"labelled", "validation", "unlabelled", "test"}
    assert ((splits["refit"] >= 0) == (splits["split"] == "labelled")).all()
    counts = pd.crosstab(splits["refit"], splits["label"]).loc[range(4), range(3)]
    assert (counts.max() - counts.min() <= 1).all()
    pd.testing.assert_frame_equal(splits.drop(columns="refit"), make_splits(images, FinetuneSettings(labels=90)))


def test_the_label_seed_moves_the_refits():
    labels = labels_of(10, 10)
    first, same, other = (draw_refits(labels, 5, seed, ("a", "b")) for seed in (0, 0, 1))
    assert (first == same).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("counts", "refits", "words"),
    [((5, 3), 4, "'class 1' has 3: choose 3 or fewer"), ((5, 1), 2, "'class 1' has 1: leave it 0"), ((), 2, "there is none: leave it 0")],
)
def test_more_refits_than_labels_of_a_class_are_refused(counts, refits, words):
    images = images_of(labels_of(*counts, unknown=4))
    if counts:
        make_splits(images, FinetuneSettings(), num_refits=min(counts) if min(counts) > 1 else 0)
    with pytest.raises(InputError, match=f"evaluate.cross_validate = {refits} .* {words}, or label more images"):
        make_splits(images, FinetuneSettings(), num_refits=refits)


def test_the_label_seed_moves_labels_and_validation():
    images = images_of(labels_of(100, 100))
    first, same, other = (make_splits(images, FinetuneSettings(labels=60, label_seed=seed)) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, same)
    assert (first["split"] != other["split"]).any()


def test_no_label_at_all_is_enough_for_pretraining_but_not_for_a_draw():
    images = Images(
        "made",
        torch.zeros(3, 1, 8, 8, dtype=torch.uint8),
        pd.DataFrame({"id": ["a", "b", "c"], "path": ["a", "b", "c"], "label": [-1, -1, -1], "split": ["train"] * 3}),
        (),
        True,
    )
    assert set(make_splits(images, FinetuneSettings())["split"]) == {"unlabelled"}
    with pytest.raises(InputError, match="No training image carries a label"):
        make_splits(images, FinetuneSettings(labels=2))


def test_splits_come_back_as_they_were_written(tmp_path):
    names = ["007", "NA", "1e5", 'a "quoted", name.png', "two\nlines.png", "ünïcode/1.png"]
    splits = pd.DataFrame({"id": names, "path": names, "label": [0, -1, 1, 2, 0, -1], "split": ["labelled", "unlabelled", "test"] * 2})
    write_splits(splits, tmp_path / "splits.csv")
    read = pd.read_csv(tmp_path / "splits.csv", dtype={"id": "str", "path": "str"}, keep_default_na=False)
    pd.testing.assert_frame_equal(read, splits)
    first = (tmp_path / "splits.csv").read_bytes()
    write_splits(read, tmp_path / "splits.csv")
    assert (tmp_path / "splits.csv").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["splits.csv"]
