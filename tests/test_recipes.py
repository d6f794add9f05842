"""Recipes: each resolves to its paper's numbers on a data set of the paper's size, and takes one step on generated images of its size."""

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import typer

import modicum
from modicum import cli
from modicum.config import load_experiment, shipped_configs
from modicum.data.images import Images
from modicum.data.stream import Stream
from modicum.method import Progress, find_method
from modicum.networks import create_backbone
from modicum.optim import build_optimizer, parameter_groups
from modicum.resolve import num_steps, resolve, stage_facts, view_arguments
from modicum.settings import Experiment
from modicum.views.policies import build_policy

CHECKOUT = Path(modicum.__file__).parent.parent
TEMPERATURES = {"moco_v1": 0.07, "moco_v2": 0.2, "moco_v3": 1.0, "simclr": 0.1, "swav": 0.1}
RECIPES = [name for name in shipped_configs() if name.startswith(("imagenet_", "cifar10"))]


@cache
def images(name: str, num_images: int) -> Images:
    """Black images of the data set's size, all in the memory of one; a thousandth of them are test images."""
    size = 32 if name == "cifar10" else 224
    manifest = pd.DataFrame({"id": np.arange(num_images).astype(str), "path": "", "label": np.arange(num_images) % 10, "split": "train"})
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8).expand(num_images, -1, -1, -1)
    return Images(name, pixels, manifest, tuple("0123456789"), mirror=True)


@cache
def resolved(recipe: str) -> Experiment:
    """With as many training images as the paper had."""
    experiment = load_experiment(recipe)
    return resolve(experiment, images(experiment.data.name, 50_000 if experiment.data.name == "cifar10" else 1_281_167))[0]


def test_no_row_of_the_papers_is_missing() -> None:
    rows = {"imagenet_" + row for row in ("moco_v1_200", "moco_v2_200", "moco_v2_800", "moco_v3_800", "moco_eman_200", "moco_eman_800")}
    rows |= {f"imagenet_{method}_{epochs}" for method in ("simclr", "byol", "swav") for epochs in (200, 800)}
    assert rows | {"imagenet_byol_eman_200", "imagenet_eman", "cifar10"} <= set(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "optimizer", "lr", "decay", "momentum", "queue", "steps"),
    [
        ("imagenet_moco_v1_200", "sgd", 0.03, 1e-4, 0.999, 65536, 1_000_912),
        ("imagenet_moco_v2_200", "sgd", 0.03, 1e-4, 0.999, 65536, 1_000_912),
        ("imagenet_moco_v2_800", "sgd", 0.03, 1e-4, 0.999, 65536, 4_003_647),
        ("imagenet_moco_eman_800", "sgd", 0.03, 1e-4, 0.999, 65536, 4_003_647),
        ("imagenet_moco_v3_300", "lars", 4.8, 1e-6, 0.99, None, 93_836),
        ("imagenet_moco_v3_800", "lars", 4.8, 1.5e-6, 0.996, None, 250_228),
        ("imagenet_simclr_800", "lars", 4.8, 1e-6, None, None, 250_228),
        ("imagenet_byol_800", "lars", 3.2, 1.5e-6, 0.996, None, 250_228),
        ("imagenet_byol_eman_200", "lars", 1.8, 1e-6, 0.98, None, 500_456),
        ("imagenet_swav_800", "lars", 4.8, 1e-6, None, 0, 250_228),
        ("cifar10", "sgd", 0.06, 5e-4, 0.99, 4096, 19_532),
    ],
)
def test_a_recipe_resolves_to_the_papers_numbers(
    recipe: str, optimizer: str, lr: float, decay: float, momentum: float | None, queue: int | None, steps: int
) -> None:
    settings = resolved(recipe).pretrain
    assert settings.method.get("temperature") == TEMPERATURES.get(settings.method["name"]) or recipe == "cifar10"
    found = settings.optimizer
    assert (found.name, found.lr, found.weight_decay) == (optimizer, pytest.approx(lr), decay)
    assert settings.method.get("teacher", {}).get("momentum") == momentum
    assert settings.method.get("queue_size") == queue
    assert num_steps(settings, 50_000 if recipe == "cifar10" else 1_281_167) == steps
    if settings.method.get("teacher", {}).get("norm") == "shuffle_bn":
        assert settings.method["teacher"]["groups"] == 8


def test_swav_has_the_papers_crops_and_prototypes() -> None:
    experiment = resolved("imagenet_swav_200")
    assert isinstance(experiment.pretrain.views, list)
    sizes = [build_policy(view, **view_arguments(experiment.data)).size for view in experiment.pretrain.views]
    assert (sizes, experiment.pretrain.method["num_prototypes"]) == ([224] * 2 + [96] * 6, 3000)


def test_fixmatch_eman_has_the_papers_numbers() -> None:
    settings = resolved("imagenet_eman").finetune
    assert (settings.batch_size, settings.mu, settings.labels, settings.schedule) == (64, 5, "10%", "step")
    assert settings.method["threshold"] == 0.7
    assert isinstance(settings.views, list)
    assert [build_policy(view, **view_arguments(resolved("imagenet_eman").data)).recipe.num_operations for view in settings.views] == [0, 2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_of_a_recipe_says_what_there_is_to_know(recipe: str) -> None:
    folder = CHECKOUT / "configs" / ("" if recipe == "cifar10" else "recipes")
    header = [line.removeprefix("# ") for line in (folder / f"{recipe}.yaml").read_text().splitlines() if line.startswith("#")]
    group: Any = typer.main.get_command(cli.app)
    for line in header[: header.index("#")]:
        program, command, *arguments = shlex.split(line)
        assert (program, group.commands[command].make_context(command, arguments).params["config"]) == ("modicum", recipe)
    text = " ".join(header)
    assert "arXiv:" in text.partition("Published: ")[2].partition("Hardware: ")[0]
    assert f"{resolved(recipe).pretrain.epochs:g} epochs" in text
    assert f"`{recipe}`" in (CHECKOUT / "docs" / "recipes.md").read_text()


def kind_of_step(recipe: str) -> tuple[str, str]:
    """What a step depends on, but for numbers."""
    method = load_experiment(recipe).pretrain.method
    return method["name"], method.get("teacher", {}).get("norm", "") + load_experiment(recipe).data.name


@pytest.mark.parametrize("recipe", list({kind_of_step(name): name for name in RECIPES}.values()))
def test_a_recipe_takes_a_step_on_images_of_its_size(recipe: str) -> None:
    """Two images a step instead of hundreds, four where two norm groups share them; recipes that differ in numbers take the same step."""
    grouped = resolved(recipe).pretrain.method.get("teacher", {}).get("norm") == "shuffle_bn"
    batch_size = 4 if grouped else 2
    overrides = [f"pretrain.batch_size={batch_size}"]
    overrides += ["pretrain.method.queue_size=8", "pretrain.method.teacher.groups=2"] if recipe == "cifar10" else []
    asked = load_experiment(recipe, overrides)
    few = images(asked.data.name, 16)
    generated = torch.randint(0, 256, few.pixels.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    experiment, _ = resolve(asked, few)
    settings = experiment.pretrain
    assert isinstance(settings.views, list)
    policies = [build_policy(view, **view_arguments(experiment.data)) for view in settings.views]
    backbone = create_backbone(experiment.backbone, few.channels, few.image_size, 0)
    facts = stage_facts("pretrain", settings.model_dump(), few)
    method = find_method("pretrain", settings.method["name"]).from_settings(backbone, facts, 0, settings.method)
    rows = torch.arange(len(generated))
    batch = {"unlabelled": Stream(generated, rows, rows[:0], policies, batch_size, torch.device("cpu"), (0, "pretrain")).sample(0)}
    optimizer = build_optimizer(settings.optimizer, parameter_groups([(method, 1.0)], float(settings.optimizer.weight_decay)))
    before = backbone.network.conv1.weight.detach().clone()
    loss = method(batch)
    loss.total.backward()
    optimizer.step()
    method.after_step(Progress(1, facts.steps))
    assert torch.isfinite(loss.total)
    assert not torch.equal(backbone.network.conv1.weight, before)
    assert all(parameter.isfinite().all() for parameter in method.parameters())
