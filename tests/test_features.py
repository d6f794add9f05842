"""Features are computed once and are those of the network; predictions of a folder."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from modicum.checkpoint import Preprocessing, load_classifier, save_classifier
from modicum.errors import InputError
from modicum.evaluate.features import FeatureStore, apply_head, extract, raw_pixels
from modicum.evaluate.predict import predict
from modicum.hardware import Hardware
from modicum.networks import Classifier, create_backbone
from modicum.settings import BackboneSettings

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


def test_features_are_those_of_the_normalised_images_in_evaluation_mode():
    network = Counting()
    images = pixels(7)
    found = extract(network, images, PREPROCESSING, CPU, batch_size=3, description="")
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (PREPROCESSING.mean, PREPROCESSING.std))
    expected = (images.float() / 255 - mean) / std / (1 + network.norm.eps) ** 0.5
    torch.testing.assert_close(found, expected.flatten(1))
    assert network.seen == 7


def test_features_are_computed_once_and_again_only_when_something_changes(tmp_path):
    network, images = Counting(), pixels(5)

    def read(images: torch.Tensor = images, preprocessing: Preprocessing = PREPROCESSING) -> torch.Tensor:
        return FeatureStore(tmp_path, CPU, 4).features("some", network, preprocessing, images)

    first = read()
    assert network.seen == 5
    torch.testing.assert_close(read(), first, rtol=0, atol=0)
    assert network.seen == 5
    with torch.no_grad():
        network.norm.weight.mul_(2)
    torch.testing.assert_close(read(), 2 * first)
    assert network.seen == 10
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    read(other)
    assert network.seen == 15
    read(other, Preprocessing(8, 3, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    assert network.seen == 20


def test_features_that_another_run_has_are_not_computed_again(tmp_path):
    network, images = Counting(), pixels(5)
    theirs = FeatureStore(tmp_path / "theirs", CPU, 4).features("some", network, PREPROCESSING, images)
    store = FeatureStore(tmp_path / "mine", CPU, 4, elsewhere=[tmp_path / "theirs"])
    assert torch.equal(store.features("some", network, PREPROCESSING, images), theirs)
    assert network.seen == 5
    with torch.no_grad():
        network.norm.weight.mul_(2)
    store.features("some", network, PREPROCESSING, images)
    assert network.seen == 10
    assert (tmp_path / "mine" / "some.safetensors").is_file()


def test_half_written_features_are_never_read(tmp_path):
    network, images = Counting(), pixels(5)
    FeatureStore(tmp_path, CPU, 4).features("some", network, PREPROCESSING, images)
    assert [path.name for path in tmp_path.iterdir()] == ["some.safetensors"]


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


def test_predict_refuses_what_is_no_folder(tmp_path, classifier_folder):
    with pytest.raises(InputError, match="no folder of images"):
        predict(classifier_folder, tmp_path / "nowhere", tmp_path / "out.csv", CPU)
    with pytest.raises(InputError, match="does not exist"):
        predict(classifier_folder, tmp_path, tmp_path / "nowhere" / "out.csv", CPU)
