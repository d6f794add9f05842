"""Features are computed once and are those of the network; predictions of a folder."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from modicum.checkpoint import Preprocessing, load_classifier, save_classifier
from modicum.data.images import Images
from modicum.errors import InputError
from modicum.evaluate.classifiers import apply_head
from modicum.evaluate.predict import predict
from modicum.evaluate.raw_pixels import raw_pixels
from modicum.features import FeatureStore, outputs, prepare
from modicum.hardware import Hardware
from modicum.neighbours import nearest_others
from modicum.networks import Classifier, create_backbone
from modicum.settings import BackboneSettings
from modicum.views.policies import build_policy

CPU = Hardware(torch.device("cpu"), "fp32", 1)
PREPROCESSING = Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


class Counting(nn.Module):
    """Flattens, and counts the images that it was asked about; has a norm layer, so that the mode matters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return self.norm(images).flatten(1)


def pixels(count: int, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def images_of(pixels: torch.Tensor) -> Images:
    """The last two are test images."""
    names = [f"{at}.png" for at in range(len(pixels))]
    split = ["train"] * (len(pixels) - 2) + ["test"] * 2
    return Images("some", pixels, pd.DataFrame({"id": names, "path": names, "label": -1, "split": split}), ("a",), False)


def test_features_are_those_of_the_normalised_images_in_evaluation_mode():
    network, rows = Counting().train(), np.array([6, 0, 3, 1])
    images = images_of(pixels(7))
    found = outputs(network, images, rows, PREPROCESSING, CPU, batch_size=3)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (PREPROCESSING.mean, PREPROCESSING.std))
    expected = (images.pixels[rows].float() / 255 - mean) / std / (1 + network.norm.eps) ** 0.5
    torch.testing.assert_close(found, expected.flatten(1))
    assert network.seen == 4
    assert network.training


def test_plain_images_are_those_of_the_training_to_the_last_bit():
    plain = {"image_size": 8, "channels": 3, "mirror": False, "mean": PREPROCESSING.mean, "std": PREPROCESSING.std}
    expected = build_policy({"name": "none"}, **plain)(pixels(50), {})
    assert torch.equal(prepare(pixels(50), PREPROCESSING, CPU.device), expected)


def test_features_are_computed_once_and_again_only_when_something_changes(tmp_path):
    network, images = Counting(), images_of(pixels(5))

    def read(
        images: Images = images, preprocessing: Preprocessing = PREPROCESSING, rows: tuple[int, ...] = (0, 1, 2, 3, 4)
    ) -> torch.Tensor:
        return FeatureStore(tmp_path / "kept", images, CPU, 4).features("some", network, preprocessing, np.array(rows))

    first = read()
    assert network.seen == 5
    torch.testing.assert_close(read(), first, rtol=0, atol=0)
    assert network.seen == 5
    with torch.no_grad():
        network.norm.weight.mul_(2)
    torch.testing.assert_close(read(), 2 * first)
    assert network.seen == 10
    changed = pixels(5)
    changed[0, 0, 0, 0] ^= 1
    other = images_of(changed)
    read(other)
    assert network.seen == 15
    read(other, Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    assert network.seen == 20
    torch.testing.assert_close(read(rows=(3, 1)), 2 * first[[3, 1]])
    assert network.seen == 22


def test_of_all_images_those_of_a_split_that_were_asked_for_before_are_not_asked_for_again(tmp_path):
    network, images = Counting(), images_of(pixels(7))
    images.manifest["split"] = ["test", "train", "train", "test", "train", "train", "train"]
    store = FeatureStore(tmp_path / "kept", images, CPU, 4)
    train = store.of_split("train", "some", network, PREPROCESSING)
    assert network.seen == len(train) == 5
    everything = store.of_all("some", network, PREPROCESSING)
    assert network.seen == 7
    torch.testing.assert_close(everything, outputs(network, images, np.arange(7), PREPROCESSING, CPU))
    assert torch.equal(everything[images.rows("train")], train)


def test_features_that_another_run_has_are_not_computed_again(tmp_path):
    network, images, rows = Counting(), images_of(pixels(5)), np.arange(5)
    theirs = FeatureStore(tmp_path / "theirs", images, CPU, 4).features("some", network, PREPROCESSING, rows)
    store = FeatureStore(tmp_path / "mine", images, CPU, 4, elsewhere=[tmp_path / "theirs"])
    assert torch.equal(store.features("some", network, PREPROCESSING, rows), theirs)
    assert network.seen == 5
    with torch.no_grad():
        network.norm.weight.mul_(2)
    store.features("some", network, PREPROCESSING, rows)
    assert network.seen == 10
    assert (tmp_path / "mine" / "some.safetensors").is_file()


def test_neighbours_are_searched_for_once_among_the_same_features(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path / "kept", images_of(pixels(5)), CPU)
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    expected = nearest_others(rows, 3)
    for _ in range(2):
        for found, right in zip(store.neighbours("some", rows, 3), expected, strict=True):
            np.testing.assert_array_equal(found, right)
        monkeypatch.setattr("modicum.features.nearest_others", lambda *_: pytest.fail("searched twice"))
    monkeypatch.undo()
    assert store.neighbours("some", rows, 4)[1].shape == (20, 4)
    np.testing.assert_array_equal(store.neighbours("some", -rows[::-1], 3)[1], nearest_others(-rows[::-1], 3)[1])


def test_half_written_features_are_never_read_and_damaged_ones_made_anew(tmp_path):
    network, store = Counting(), FeatureStore(tmp_path, images_of(pixels(5)), CPU, 4)
    first = store.features("some", network, PREPROCESSING, np.arange(5))
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]
    (tmp_path / "some.safetensors").write_bytes(b"damaged")
    assert torch.equal(store.features("some", network, PREPROCESSING, np.arange(5)), first)
    assert network.seen == 10


def test_raw_pixels_are_fractions_and_large_images_are_averaged():
    small, note = raw_pixels(pixels(2))
    assert small.shape == (2, 192)
    assert not note
    np.testing.assert_allclose(small, pixels(2).flatten(1).numpy() / 255, rtol=1e-6)
    large, note = raw_pixels(pixels(2, 96))
    assert large.shape == (2, 3 * 32 * 32)
    assert "96 to 32" in note
    np.testing.assert_allclose(large[0, 0], pixels(2, 96)[0, 0, :3, :3].float().mean() / 255, rtol=1e-5)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    classifier = Classifier(create_backbone(BackboneSettings(), 3, 16, seed=0), 3)
    nn.init.normal_(classifier.head.weight, std=3.0)
    save_classifier(folder, classifier, Preprocessing(16, 3, (0.5,) * 3, (0.25,) * 3), ("cat", "dog, small", "<b>"))
    return folder


def write_images(folder, count):
    for at in range(count):
        path = folder / f"{'abc'[at % 3]}" / f"{at}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(count, 20)[at].permute(1, 2, 0).numpy()).save(path)


def test_predict_labels_every_image_of_a_folder(tmp_path, classifier_folder):
    write_images(tmp_path / "images", 7)
    out = tmp_path / "out.csv"
    predict(classifier_folder, tmp_path / "images", out, CPU)
    table = pd.read_csv(out, keep_default_na=False)
    assert list(table.columns) == ["path", "class", "confidence"]
    assert list(table["path"]) == ["a/0.png", "a/3.png", "a/6.png", "b/1.png", "b/4.png", "c/2.png", "c/5.png"]
    assert set(table["class"]) <= {"cat", "dog, small", "<b>"}
    assert table["confidence"].between(1 / 3, 1).all()


def test_predict_agrees_with_the_classifier_as_loaded(tmp_path, classifier_folder):
    (tmp_path / "images").mkdir()
    image = pixels(1, 16)[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / "one.png")
    classifier, _, names = load_classifier(classifier_folder)
    with torch.no_grad():
        expected = classifier((image[None].float() / 255 - 0.5) / 0.25).softmax(dim=1)[0]
        features = classifier.backbone((image[None].float() / 255 - 0.5) / 0.25)
    table = predict(classifier_folder, tmp_path / "images", tmp_path / "out.csv", CPU)
    assert table["class"][0] == names[int(expected.argmax())]
    assert table["confidence"][0] == pytest.approx(float(expected.max()), abs=1e-5)
    assert apply_head(classifier.head, features, CPU).argmax() == int(expected.argmax())


def test_predict_names_every_unreadable_file_and_writes_nothing(tmp_path, classifier_folder):
    write_images(tmp_path / "images", 3)
    (tmp_path / "images" / "bad.png").write_text("no image")
    (tmp_path / "images" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError) as caught:
        predict(classifier_folder, tmp_path / "images", tmp_path / "out.csv", CPU)
    assert "bad.png" in str(caught.value)
    assert "cut.jpg" in str(caught.value)
    assert not (tmp_path / "out.csv").exists()


def test_predict_overwrites_only_when_forced(tmp_path, classifier_folder):
    write_images(tmp_path / "images", 1)
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        predict(classifier_folder, tmp_path / "images", tmp_path / "out.csv", CPU)
    assert (tmp_path / "out.csv").read_text() == "mine"
    predict(classifier_folder, tmp_path / "images", tmp_path / "out.csv", CPU, force=True)
    assert "a/0.png" in (tmp_path / "out.csv").read_text()


def test_predict_writes_where_a_link_leads(tmp_path, classifier_folder):
    write_images(tmp_path / "images", 1)
    (tmp_path / "there.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("there.csv")
    predict(classifier_folder, tmp_path / "images", tmp_path / "link.csv", CPU, force=True)
    assert (tmp_path / "link.csv").is_symlink()
    assert "a/0.png" in (tmp_path / "there.csv").read_text()


def test_predict_refuses_first_what_it_could_not_write(tmp_path, classifier_folder, monkeypatch):
    monkeypatch.setattr("modicum.evaluate.predict.load_classifier", lambda folder: pytest.fail("began"))
    with pytest.raises(InputError, match="no file that could be overwritten"):
        predict(classifier_folder, tmp_path, tmp_path, CPU, force=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot be written to"):
        predict(classifier_folder, tmp_path, tmp_path / "out.csv", CPU)


def test_predict_refuses_what_is_no_folder(tmp_path, classifier_folder):
    with pytest.raises(InputError, match="no folder of images"):
        predict(classifier_folder, tmp_path / "nowhere", tmp_path / "out.csv", CPU)
    with pytest.raises(InputError, match="does not exist"):
        predict(classifier_folder, tmp_path, tmp_path / "nowhere" / "out.csv", CPU)
