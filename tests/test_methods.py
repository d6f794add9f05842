"""The one conformance test: every method that lies in a methods folder, with every teacher it takes."""

import copy
import re
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from modicum.checkpoint import Preprocessing, save_classifier
from modicum.method import Facts, Method, Progress, find_method, method_names, settings_model
from modicum.networks import Backbone, Classifier
from modicum.networks.backbones import choose_architecture
from modicum.optim import Pace, build_optimizer, parameter_groups
from modicum.pretrain.prototypes import Prototypes
from modicum.randomness import seeded
from modicum.settings import BackboneSettings, OptimizerSettings, TeacherSettings
from modicum.teacher import Teacher
from modicum.views.policies import build_policy

SIZE, CLASSES, BATCH, STEPS = 16, 10, 16, 100
VIEW = {"image_size": SIZE, "channels": 1, "mirror": False, "mean": [0.5], "std": [0.25]}


class FrozenSample:
    """The views of one batch, always the same, as leaves that show which of them a gradient reaches."""

    def __init__(self, policies: list[str], size: int, device: str = "cpu") -> None:
        make = torch.Generator().manual_seed(size)
        pixels = torch.randint(0, 256, (size, 1, SIZE, SIZE), generator=make, dtype=torch.uint8).to(device)
        self.views = []
        for name in policies:
            policy = build_policy({"name": name}, **VIEW)
            self.views.append(policy(pixels, policy.draw(make, size)).requires_grad_())
        self.labels = (torch.arange(size) % CLASSES).to(device)
        self.rows = torch.arange(size, device=device)
        self.positions = self.rows

    @property
    def num_views(self) -> int:
        return len(self.views)

    def view(self, number: int, order: Tensor | None = None) -> Tensor:
        return self.views[number] if order is None else self.views[number][order]

    def previous(self) -> "FrozenSample":
        return self

    def permutation(self) -> Tensor:
        return torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(0))


def variants() -> list[tuple[str, str, dict[str, Any]]]:
    """Every method under its own defaults and with every teacher norm that it accepts."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for stage in ("pretrain", "finetune"):
        for name in method_names(stage):
            if not find_method(stage, name).views:
                continue  # it takes no step: tests/test_propagation.py
            model = settings_model(find_method(stage, name))
            fields = model.model_fields
            # Random weights are never sure of anything; ShrinkMatch learns from guesses on both sides of its threshold.
            easy = {"threshold": 0.13 if name == "shrinkmatch" else 0.05} if "threshold" in fields else {}
            if "teacher" not in fields:
                found.append((stage, name, easy))
                continue
            norms = find_method(stage, name).teacher_norms
            found += [
                (stage, name, easy | {"teacher": {"norm": norm, "groups": 2} if norm == "shuffle_bn" else {"norm": norm}}) for norm in norms
            ]
            if "none" in get_args(get_args(fields["teacher"].annotation)[-1] if get_args(fields["teacher"].annotation) else None):
                found.append((stage, name, easy | {"teacher": "none"}))
    return found


VARIANTS = variants()
every_variant = pytest.mark.parametrize(
    ("stage", "name", "settings"), VARIANTS, ids=[f"{n}-{s.get('teacher', '')}" for _, n, s in VARIANTS]
)


@cache
def backbone(name: str) -> Backbone:
    """Of a step of a residual network nearly all is convolution: narrow, and on a quarter of the side, it takes a fifth of the time."""
    if name != "residual":
        architecture = choose_architecture(BackboneSettings(name=name), 1, SIZE)
    else:
        architecture = choose_architecture(BackboneSettings(stem="standard"), 1, SIZE)
        architecture = replace(architecture, arguments={**architecture.arguments, "channels": [16, 32, 32, 64]})
    with seeded(0, "backbone"):
        return Backbone(architecture)


@cache
def taught() -> "tempfile.TemporaryDirectory[str]":
    """The classifier of another run, for methods that learn from one."""
    folder = tempfile.TemporaryDirectory()
    with seeded(1, "teacher"):
        classifier = Classifier(Backbone(backbone("residual").architecture), CLASSES)
    save_classifier(Path(folder.name), classifier, Preprocessing(SIZE, 1, (0.5,), (0.25,)), tuple(map(str, range(CLASSES))))
    return folder


def build(stage: str, name: str, settings: dict[str, Any], architecture: str = "residual") -> Method:
    facts = Facts(
        64,
        CLASSES,
        SIZE,
        STEPS,
        BATCH,
        transformer=backbone(architecture).architecture.fixed_size,
        ema_momentum=0.9,
        num_labelled=BATCH,
        num_unlabelled=2 * BATCH,
        class_shares=(1 / CLASSES,) * CLASSES,
    )
    kind = find_method(stage, name)
    resolved = settings_model(kind)(**settings).model_dump()
    if "teacher_from" in resolved:
        resolved["teacher_from"] = taught().name
    for key, (value, _) in kind.decide(resolved, facts).items():
        *parents, last = key.split(".")
        section = resolved
        for parent in parents:
            section = section[parent]
        section[last] = value
    method = kind.from_settings(copy.deepcopy(backbone(architecture)), facts, 0, resolved)
    method.progress = Progress(STEPS // 2, STEPS)  # where no ramp is at zero
    return method


def batch_for(method: Method, device: str = "cpu") -> dict[str, FrozenSample]:
    sizes = {"labelled": BATCH, "unlabelled": 2 * BATCH}
    return {stream: FrozenSample(list(policies), sizes[stream], device) for stream, policies in method.views.items()}


def optimizer_for(method: Method) -> torch.optim.Optimizer:
    settings = OptimizerSettings(name="sgd", lr=0.02, weight_decay=0.0, momentum=0.9, nesterov=False)
    return build_optimizer(settings, parameter_groups([(method, 1.0)], 0.0))


def step(method: Method, optimizer: torch.optim.Optimizer, batch: dict[str, FrozenSample], number: int) -> Tensor:
    torch.manual_seed(number)  # as the loop does, for dropout
    method.progress = Progress(number, STEPS)
    loss = method(batch)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()
    method.after_step(Progress(number + 1, STEPS))
    return loss.total.detach()


def begun(method: Method, batch: dict[str, FrozenSample]) -> Method:
    """After one step, since what a method remembers of an image is empty before; without the step's gradients."""
    step(method, optimizer_for(method), batch, 0)
    for tensor in [*method.parameters(), *(view for sample in batch.values() for view in sample.views)]:
        tensor.grad = None
    method.progress = Progress(STEPS // 2, STEPS)
    return method


@every_variant
def test_loss_is_finite_and_its_gradient_reaches_the_views_it_should(stage: str, name: str, settings: dict[str, Any]) -> None:
    method = build(stage, name, settings)
    batch = batch_for(method)
    loss = begun(method, batch)(batch)
    assert loss.total.ndim == 0
    assert torch.isfinite(loss.total)
    assert all(part.ndim == 0 and part.isfinite() and part != 0 for part in loss.parts.values()), loss.parts  # fairness is below zero
    loss.total.backward()
    for stream, sample in batch.items():
        for number, view in enumerate(sample.views):
            reached = view.grad is not None and bool(view.grad.flatten(1).abs().sum(dim=1).all())
            assert reached == (number not in method.target_views.get(stream, ())), f"{stream} view {number}"
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in method.student.parameters())


@every_variant
def test_every_part_has_a_gradient_of_its_own(stage: str, name: str, settings: dict[str, Any]) -> None:
    method = build(stage, name, settings)
    batch = batch_for(method)
    parts = begun(method, batch)(batch).parts
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]  # a part may be an estimator's or a teacher's
    for part in parts.values():
        gradients = torch.autograd.grad(part, trainable, retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@every_variant
def test_the_teacher_gets_no_gradient_and_follows_the_student(stage: str, name: str, settings: dict[str, Any]) -> None:
    method = build(stage, name, settings)
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    assert len(teachers) == (1 if stage == "finetune" or "teacher" in settings else 0)
    before = [[parameter.clone() for parameter in teacher.parameters()] for teacher in teachers]
    step(method, optimizer_for(method), batch_for(method), 0)
    for teacher, old in zip(teachers, before, strict=True):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
        assert any(not torch.equal(parameter, was) for parameter, was in zip(teacher.parameters(), old, strict=True))


@every_variant
def test_twenty_steps_on_one_batch_lower_the_loss(stage: str, name: str, settings: dict[str, Any]) -> None:
    method = build(stage, name, settings)
    optimizer, batch = optimizer_for(method), batch_for(method)
    if hasattr(method, "queue"):  # a queue that fills with the same keys is another task every step
        method.queue.enqueue = lambda keys: None
    if hasattr(method, "centre_momentum"):  # so are targets that move with their centre
        method.centre_momentum = 1.0
    if hasattr(method, "bank"):  # and images to be like, of which there are none at first
        step(method, optimizer, batch, 0)
    losses = [float(step(method, optimizer, batch, 0)) for _ in range(20)]  # always step 0: ramps stand still
    assert losses[-1] < losses[0], losses


@every_variant
def test_a_loaded_state_continues_with_the_same_loss(stage: str, name: str, settings: dict[str, Any], tmp_path: Any) -> None:
    method = build(stage, name, settings)
    optimizer, batch = optimizer_for(method), batch_for(method)
    for number in range(3):
        step(method, optimizer, batch, number)
    torch.save({"method": method.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = [step(method, optimizer, batch, number) for number in (3, 4)]

    again = build(stage, name, settings)
    other = optimizer_for(again)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["method"])
    other.load_state_dict(state["optimizer"])
    for number, loss in zip((3, 4), expected, strict=True):
        assert torch.equal(step(again, other, batch, number), loss)


@every_variant
def test_a_whole_step_runs_on_the_meta_device(stage: str, name: str, settings: dict[str, Any]) -> None:
    """A tensor made on the wrong device, `.item()` or another read of device memory raises there: the step is ready for a GPU."""
    method = build(stage, name, settings).to("meta")
    loss = step(method, optimizer_for(method), batch_for(method, "meta"), 0)
    assert loss.device.type == "meta"


@every_variant
def test_a_step_in_bf16_has_a_loss_in_full_precision_near_that_of_fp32(stage: str, name: str, settings: dict[str, Any]) -> None:
    losses = []
    for rounded in (False, True):
        method = build(stage, name, settings)
        batch = batch_for(method)
        begun(method, batch)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            losses.append(method(batch).total)
        losses[-1].backward()
        method.after_step(Progress(STEPS // 2 + 1, STEPS))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage in ("pretrain", "finetune") for name in method_names(stage)])
def test_settings_are_documented(stage: str, name: str) -> None:
    method = find_method(stage, name)
    source = sys.modules[method.__module__].__doc__ or ""
    assert re.search(r"arXiv:\d{4}\.\d{5}|\w+ \d{4}, ", source) or name == "supervised", "the first line names the paper"
    for key, field in settings_model(method).model_fields.items():
        assert field.description, f"{name}.{key} has no meaning"


def test_a_transformer_takes_crops_of_several_sizes() -> None:
    method = build("pretrain", "dino", {"hidden_size": 32}, "vit_tiny_patch16_224")
    batch = batch_for(method)
    assert {view.shape[-1] for view in batch["unlabelled"].views} == {16, 8}
    method(batch).total.backward()
    assert all(view.grad.flatten(1).abs().sum(dim=1).all() for view in batch["unlabelled"].views)


@pytest.mark.parametrize(("name", "pace"), [("simsiam", Pace(scheduled=False)), ("swav", Pace(starts=0.04)), ("dino", Pace(starts=0.04))])
def test_parts_that_do_not_follow_the_learning_rate(name: str, pace: Pace) -> None:
    """SimSiam's predictor learns at a constant rate; prototypes stand still in the first epoch, here 4 of 100 steps."""
    method = build("pretrain", name, {})
    (part,) = (method.get_submodule(part) for part in method.paces)
    assert list(method.paces.values()) == [pace]
    assert isinstance(part, Prototypes) or part is method.predictor


def test_dinos_centre_follows_the_teachers_outputs() -> None:
    method = build("pretrain", "dino", {"hidden_size": 32, "centre_momentum": 0.8})
    batch = batch_for(method)
    method.centre.fill_(0.5)
    method(batch)
    outputs = torch.cat([method.teacher(batch["unlabelled"], view=number) for number in (0, 1)])
    method.after_step(Progress(1, STEPS))
    torch.testing.assert_close(method.centre, 0.8 * 0.5 + 0.2 * outputs.mean(dim=0))


def test_swav_assigns_together_with_its_queue_once_that_is_full() -> None:
    method = build("pretrain", "swav", {"queue_size": 48, "queue_epochs": 0, "hidden_size": 32})
    batch, alone = batch_for(method), build("pretrain", "swav", {"hidden_size": 32, "num_prototypes": 64})
    assert method.queue_starts == 3  # 48 images, 16 a step
    for number, same in ((2, True), (3, False)):
        method.progress = alone.progress = Progress(number, STEPS)
        assert torch.equal(method(batch).total, alone(batch).total) == same


def test_a_variant_of_a_method_has_its_own_defaults_and_a_config_beats_them() -> None:
    variant = settings_model(find_method("pretrain", "moco_v1"))
    assert variant().temperature == 0.07
    assert variant(temperature=0.3).temperature == 0.3
    assert variant().embedding_size == settings_model(find_method("pretrain", "moco_v2"))().embedding_size
    assert [len(build("pretrain", name, {}).student[1]) for name in ("moco_v1", "moco_v2")] == [1, 3]  # a linear head; two layers and ReLU


def test_a_symmetric_moco_is_both_directions_at_once() -> None:
    settings = {"queue_size": 40, "teacher": {"norm": "eman"}}
    both, one = (build("pretrain", "moco_v2", {**settings, "symmetric": symmetric}) for symmetric in (True, False))
    batch = batch_for(one)
    total, forth = both(batch).total, one(batch).total
    batch["unlabelled"].views.reverse()
    torch.testing.assert_close(total, forth + one(batch).total)
    assert [len(k) for k in both.new_keys] == [len(k) for k in one.new_keys] * 2  # the keys of both views enter the queue


@pytest.mark.parametrize("frozen", [True, False])
def test_moco_v3_keeps_a_transformers_patch_projection_as_drawn(frozen: bool) -> None:
    method = build("pretrain", "moco_v3", {"hidden_size": 32, "frozen_patches": frozen}, "vit_tiny_patch16_224")
    before = {name: parameter.detach().clone() for name, parameter in method.student.named_parameters()}
    step(method, optimizer_for(method), batch_for(method), 0)
    still = {name for name, parameter in method.student.named_parameters() if torch.equal(parameter, before[name])}
    patches = {"0.network.patch_embed.proj.weight", "0.network.patch_embed.proj.bias"}
    assert still & patches == (patches if frozen else set())
    assert not any(name.startswith("0.network.blocks") and "mlp" in name for name in still)


def test_teacher_settings_of_stage_one_include_eman() -> None:
    assert "eman" in get_args(TeacherSettings.model_fields["norm"].annotation)
