"""Methods that learn from a finished classifier, in one round or several: what it says, which of it counts, and the runs in a row."""

import signal
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modicum.checkpoint import Preprocessing, load_classifier, save_classifier
from modicum.config import load_experiment
from modicum.data.images import Images
from modicum.errors import InputError, Preempted
from modicum.features import outputs
from modicum.finetune.audit import Audit
from modicum.finetune.methods.noisy_student import NoisyStudent
from modicum.finetune.run import run
from modicum.finetune.selection import MOST_COPIES, selection
from modicum.finetune.variants import variants, with_teachers
from modicum.method import Facts, find_method, settings_model
from modicum.networks import Backbone, Classifier, create_backbone
from modicum.networks.backbones import choose_architecture
from modicum.record import Metrics
from modicum.resolve import resolve
from modicum.session import make_request
from modicum.settings import BackboneSettings
from modicum.teacher import Teacher

CLASSES, SIZE = 3, 12
SMALL = ["finetune.init=random", "finetune.warm_start=none", "finetune.baselines=[]", "finetune.labels=30"]


def backbone(seed: int = 0) -> Backbone:
    return create_backbone(BackboneSettings(name="resnet10_tiny"), 1, SIZE, seed)


def saved(folder: Path, classes: tuple[str, ...] = ("a", "b", "c"), size: int = SIZE, channels: int = 1, mean: float = 0.5) -> Path:
    architecture = choose_architecture(BackboneSettings(name="resnet10_tiny"), channels, size)
    preprocessing = Preprocessing(size, channels, (mean,) * channels, (0.25,) * channels)
    save_classifier(folder, Classifier(Backbone(architecture), len(classes)), preprocessing, classes)
    return folder


def build(name: str, images: int = 6, **settings: Any) -> Any:
    kind = find_method("finetune", name)
    resolved = settings_model(kind)(**settings).model_dump()
    return kind.from_settings(backbone(), Facts(images, CLASSES, SIZE, 10, 4, num_labelled=2, num_unlabelled=images), 0, resolved)


def sample(places: list[int], seed: int) -> Any:
    made = torch.randn(len(places), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    rows = torch.tensor(places)
    return SimpleNamespace(view=lambda number: made, labels=rows % CLASSES, rows=rows, positions=rows)


def softmax(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(row.astype(np.float64) / temperature)
    return powers / powers.sum()


def random_probabilities(n: int, c: int, seed: int) -> torch.Tensor:
    return (2 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(dim=1)


@pytest.mark.parametrize(("n", "c", "threshold"), [(1, 2, 0.3), (40, 3, 0.3), (40, 3, 0.7), (200, 10, 0.4)])
@pytest.mark.parametrize("balance", [True, False])
def test_what_counts_is_the_papers_rule_image_by_image(n: int, c: int, threshold: float, balance: bool) -> None:
    probabilities = random_probabilities(n, c, 1)
    kept = [i for i in range(n) if probabilities[i].max() >= threshold]
    weight = dict.fromkeys(kept, 1.0)
    if balance:
        for number in range(c):
            members = sorted((i for i in kept if probabilities[i].argmax() == number), key=lambda i: -probabilities[i].max())
            for place, i in enumerate(members):
                quota = len(kept) / c
                weight[i] = min(max(1.0, quota / len(members)), MOST_COPIES) if place < quota else 0.0
    total = sum(weight.values())
    expected = [weight.get(i, 0.0) * n / total for i in range(n)]
    np.testing.assert_allclose(selection(probabilities, threshold, balance=balance).numpy(), expected, atol=1e-12)


def test_balanced_classes_count_equally_and_the_surest_images_of_the_largest_are_kept() -> None:
    """Six images of class 0, two of class 1, and a quota of four: the four surest, and two that count twice."""
    sure = torch.tensor([0.9, 0.6, 0.8, 0.7, 0.55, 0.95, 0.6, 0.9])
    first = torch.tensor([True] * 6 + [False] * 2)
    probabilities = torch.stack([torch.where(first, sure, 1 - sure), torch.where(first, 1 - sure, sure)], dim=1)
    assert selection(probabilities, 0.3, balance=True).tolist() == pytest.approx([1, 0, 1, 1, 0, 1, 2, 2])


def test_where_no_image_is_sure_enough_none_counts() -> None:
    assert selection(torch.full((5, 4), 0.25), 0.3, balance=True).tolist() == [0] * 5


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_noisy_student_learns_what_the_teacher_said_of_each_image(kind: str) -> None:
    method = build("noisy_student", pseudo_labels=kind, dropout=0, drop_path=0, threshold=0.5, lambda_u=0.7)
    said = random_probabilities(6, CLASSES, 2).float()
    method.listen(said)
    weight = selection(said, 0.5, balance=True)
    assert 0 < (weight > 0).sum() < 6
    batch = {"labelled": sample([0, 1], 1), "unlabelled": sample([5, 2, 3, 1], 2)}
    loss = method(batch)
    with torch.no_grad():
        student = method.student(torch.cat([batch["labelled"].view(0), batch["unlabelled"].view(0)])).double().numpy()
    labelled = -sum(np.log(softmax(student[i])[i]) for i in (0, 1)) / 2
    unlabelled = 0.0
    for place, row in enumerate([5, 2, 3, 1]):
        target = said[row].double().numpy() if kind == "soft" else np.eye(CLASSES)[said[row].argmax()]
        unlabelled -= weight[row].item() * np.sum(target * np.log(softmax(student[2 + place]))) / 4
    assert loss.parts["labelled"].item() == pytest.approx(labelled, rel=1e-5)
    assert loss.parts["unlabelled"].item() == pytest.approx(unlabelled, rel=1e-5)
    assert loss.total.item() == pytest.approx(labelled + 0.7 * unlabelled, rel=1e-5)
    assert torch.equal(method.guesses.probabilities, said[[5, 2, 3, 1]])
    assert method.guesses.used.tolist() == (weight[[5, 2, 3, 1]] > 0).float().tolist()


def test_noisy_student_is_noised_in_training_alone() -> None:
    method, images = build("noisy_student", drop_path=0.9), torch.randn(8, 1, SIZE, SIZE)
    plain = backbone()
    assert method.student.backbone.architecture == plain.architecture
    assert_same_weights(method.student.backbone, plain)
    assert torch.equal(method.student.eval().backbone(images), plain.eval()(images))
    for network in (method.student, plain):
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)  # fresh blocks add nothing, so that nothing could be left out
    assert not torch.equal(method.student.backbone(images), plain(images))
    assert build("noisy_student", dropout=0.25).dropout.p == 0.25
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in method.student.modules())  # it stands outside


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_network_without_stochastic_depth_says_so() -> None:
    network = create_backbone(BackboneSettings(name="densenet121"), 1, 32, 0)
    before = network.network
    assert not network.drop_paths(0.2)
    assert network.network is before


def test_stochastic_depth_leaves_frozen_weights_frozen() -> None:
    network = backbone().requires_grad_(False)
    assert network.drop_paths(0.2)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (0.5, 0.75), (4.0, 0.0)])
def test_distill_learns_the_frozen_teacher_at_a_temperature(tmp_path: Path, temperature: float, alpha: float) -> None:
    method = build("distill", teacher_from=str(saved(tmp_path / "teacher")), temperature=temperature, alpha=alpha)
    with torch.no_grad():
        method.teacher[1].weight.mul_(20)  # random ones are sure of nothing
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    batch = {"labelled": sample([0, 1], 1), "unlabelled": sample([5, 2, 3], 2)}
    loss = method.train()(batch)
    images = torch.cat([batch["labelled"].view(0), batch["unlabelled"].view(0)])
    with torch.no_grad():
        student, teacher = method.student(images).numpy(), method.teacher.eval()(images).numpy()
    labelled = -sum(np.log(softmax(student[i])[i]) for i in (0, 1)) / 2
    told = -sum(np.sum(softmax(teacher[i], temperature) * np.log(softmax(student[i], temperature))) for i in range(5)) / 5
    assert loss.total.item() == pytest.approx((1 - alpha) * labelled + alpha * told, rel=1e-5)
    np.testing.assert_allclose(method.guesses.probabilities.numpy(), [softmax(teacher[i]) for i in (2, 3, 4)], atol=1e-6)
    loss.total.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())  # norm statistics too


@pytest.mark.parametrize(
    ("method", "folders"),
    [
        ("supervised", [""]),
        ("distill", ["teacher", ""]),
        ("{name: noisy_student, rounds: 1}", ["teacher", ""]),
        ("noisy_student", ["teacher", "rounds/1", "rounds/2", ""]),
    ],
)
def test_the_runs_behind_a_method_teach_one_another(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, method: str, folders: list[str]
) -> None:
    (whole,) = variants(session_of(digits, tmp_path, f"finetune.method={method}"))
    runs = list(with_teachers(whole))
    assert [part.folder for part in runs] == [whole.folder / folder for folder in folders]
    assert len({part.title for part in runs}) == len(runs)  # order and noise are drawn by the title
    for teacher, student in pairwise(runs):
        assert student.method["teacher_from"] == str(teacher.folder / "classifier")
    assert all(part.init == whole.init and np.array_equal(part.labelled, whole.labelled) for part in runs)
    if len(runs) > 1:
        assert runs[0].method["name"] == "supervised"


def test_a_refits_teachers_know_no_label_that_it_does_not(session_of: Callable[..., Any], digits: Images, tmp_path: Path) -> None:
    session = session_of(digits, tmp_path, "finetune.method=noisy_student", "evaluate.cross_validate=3")
    for refit in variants(session)[1:]:
        for part in with_teachers(refit):
            assert np.array_equal(part.labelled, refit.labelled)
            assert refit.folder in (part.folder, *part.folder.parents)


def test_a_teacher_that_is_named_comes_first(session_of: Callable[..., Any], digits: Images, tmp_path: Path) -> None:
    experiment = load_experiment("digits")
    resolved, _ = resolve(experiment, digits)
    folder = tmp_path / "teacher"
    save_classifier(folder, Classifier(backbone(), 10), Preprocessing.of(resolved.data), digits.class_names)
    session = session_of(digits, tmp_path / "run", f"finetune.method={{name: noisy_student, rounds: 2, teacher_from: {folder}}}")
    first, second = with_teachers(variants(session)[0])
    assert first.method["teacher_from"] == str(folder)
    assert second.method["teacher_from"] == str(first.folder / "classifier")


@pytest.mark.parametrize("part_of_it", ["true", "false"])
def test_each_round_is_told_what_the_round_before_says_of_plain_images(
    session_of: Callable[..., Any], digits: Images, tmp_path: Path, part_of_it: str
) -> None:
    options = "finetune.method={name: noisy_student, rounds: 2, threshold: 0.1}", f"finetune.labelled_in_unlabelled={part_of_it}"
    session = session_of(digits, tmp_path, *options)
    run(session)
    (whole,) = variants(session)
    assert len(np.intersect1d(whole.labelled, whole.unlabelled)) == (30 if part_of_it == "true" else 0)
    teacher, *students = with_teachers(whole)
    for student in students:
        state = torch.load(student.folder / "state.pt", weights_only=True)["method"]
        network, preprocessing, _ = load_classifier(teacher.folder / "classifier")
        said = outputs(network, session.images, whole.unlabelled, preprocessing, session.hardware).softmax(dim=1)
        assert torch.equal(state["told"], said)
        assert torch.equal(state["weight"], selection(said, 0.1, balance=True))
        per_image = sum(state[name].nbytes for name in ("told", "weight")) / len(whole.unlabelled)
        assert per_image == 4 * (10 + 1)  # docs/methods.md
        audit = {name for _, name, _ in Metrics.read(student.folder / "audit.csv")}
        assert {"epoch/accuracy", "epoch/share_used", "epoch/share/0"} <= audit
        teacher = student


@pytest.mark.parametrize("method", ["{name: noisy_student, rounds: 2}", "{name: distill, alpha: 0.5}"])
def test_a_run_preempted_in_any_of_its_parts_goes_on_to_the_same_bits(
    session_of: Callable[..., Any],
    digits: Images,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_same: Callable[[Any, Any], None],
) -> None:
    def states(name: str) -> dict[str, Any]:
        root = tmp_path / name / "finetune"
        return {str(path.relative_to(root)): torch.load(path, weights_only=True) for path in sorted(root.rglob("state.pt"))}

    run(session_of(digits, tmp_path / "whole", f"finetune.method={method}"))
    count = len(states("whole"))
    observe, steps = Audit.observe, []

    def preempt(audit: Audit) -> Any:
        steps.append(1)
        if len(steps) % 3 == 2:  # the second of each part's three steps
            signal.raise_signal(signal.SIGTERM)
        return observe(audit)

    monkeypatch.setattr(Audit, "observe", preempt)
    heard: Counter[int] = Counter()
    listen = NoisyStudent.listen
    monkeypatch.setattr(NoisyStudent, "listen", lambda self, said: (heard.update([len(steps)]), listen(self, said)))
    session = session_of(digits, tmp_path / "preempted", f"finetune.method={method}")
    for _ in range(count):
        with pytest.raises(Preempted):
            run(session)
    run(session)
    assert len(steps) == 3 * count
    assert all(times == 1 for times in heard.values())  # a round that goes on asks its teacher nothing
    assert len(heard) == (2 if "noisy" in method else 0)
    assert_same(states("whole"), states("preempted"))


def test_a_student_may_have_another_backbone_than_its_teacher(session_of: Callable[..., Any], digits: Images, tmp_path: Path) -> None:
    run(session_of(digits, tmp_path / "teacher", "finetune.method=supervised"))
    folder = tmp_path / "teacher" / "finetune" / "classifier"
    run(
        session_of(
            digits, tmp_path / "student", f"finetune.method={{name: distill, teacher_from: {folder}}}", "backbone.name=resnet10_tiny"
        )
    )
    student, _, _ = load_classifier(tmp_path / "student" / "finetune" / "classifier")
    teacher, _, _ = load_classifier(folder)
    assert teacher.backbone.num_features == 2 * student.backbone.num_features


@pytest.mark.parametrize(
    ("differences", "sentence"),
    [
        ({"classes": ("a", "b", "c")}, "knows other classes: a, b, c, where the data have 0, 1, 2, 3, 4 and 5 more."),
        ({"size": 8}, "was made for other images: it has image_size 8 for 12;"),
        ({"channels": 3}, "channels 3 for 1"),
        ({"mean": 0.1}, r"mean \(0.1,\) for"),
    ],
)
@pytest.mark.parametrize("method", ["distill", "noisy_student"])
def test_a_teacher_of_other_classes_or_images_is_refused(
    digits: Images, tmp_path: Path, method: str, differences: dict[str, Any], sentence: str
) -> None:
    folder = saved(tmp_path / "teacher", **{"classes": digits.class_names, **differences})
    with pytest.raises(InputError, match=rf"finetune\.method\.teacher_from = '.*teacher' .*{sentence}"):
        resolve(load_experiment("digits", [f"finetune.method={{name: {method}, teacher_from: {folder}}}"]), digits)


@pytest.mark.parametrize("name", ["nowhere", "~nobody-here/teacher"])
def test_a_missing_teacher_is_refused_before_a_folder_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"finetune\.method\.teacher_from = '{name}': there is no such classifier folder\."):
        make_request("digits", [f"finetune.method={{name: distill, teacher_from: {name}}}"], run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_teachers_content_belongs_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["finetune.method={name: distill, teacher_from: teacher}"]
    saved(tmp_path / "teacher")
    first = make_request("digits", options)
    assert first.experiment.finetune.method["teacher_from"] == str(tmp_path / "teacher")  # valid from everywhere
    saved(tmp_path / "teacher", mean=0.4)
    second = make_request("digits", options)
    assert first.fingerprint("finetune") != second.fingerprint("finetune")
    assert first.fingerprint("pretrain") == second.fingerprint("pretrain")


def test_noisy_student_takes_the_noisy_one_of_two_views(digits: Images) -> None:
    settings = resolve(load_experiment("digits", ["finetune.method=noisy_student", "finetune.views=[none, strong]"]), digits)[0].finetune
    assert settings.views == [{"name": "strong"}]


def test_the_average_is_the_only_moving_one(tmp_path: Path) -> None:
    method = build("distill", teacher_from=str(saved(tmp_path / "teacher")))
    assert sum(isinstance(module, Teacher) for module in method.modules()) == 1


@pytest.mark.parametrize(
    ("name", "unlabelled", "labelled"),
    [("noisy_student", 44, 0), ("temporal_ensembling", 44, 0), ("pseudo_label_mixup", 40, 0), ("flexmatch", 8, 0), ("simmatch", 0, 520)],
)
def test_the_state_holds_as_much_an_image_as_the_documents_say(name: str, unlabelled: int, labelled: int) -> None:
    kind = find_method("finetune", name)
    settings = settings_model(kind)().model_dump()

    def size(num_unlabelled: int, num_labelled: int) -> int:
        facts = Facts(100, 10, SIZE, 10, 4, num_labelled=num_labelled, num_unlabelled=num_unlabelled)
        method = kind.from_settings(backbone(), facts, 0, settings)
        return sum(value.nbytes for value in method.state_dict().values())

    assert (size(30, 20) - size(20, 20), size(20, 30) - size(20, 20)) == (10 * unlabelled, 10 * labelled)
