"""One YAML file becomes one experiment, and every mistake in it one sentence that names the key."""

from pathlib import Path

import pytest
import yaml

from modicum.config import flatten, load_experiment, shipped_configs
from modicum.errors import InputError
from modicum.settings import HARMLESS, Experiment


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def sentence(config: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_experiment(config, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("config", shipped_configs())
def test_shipped_configs_are_valid(config: str) -> None:
    assert isinstance(load_experiment(config), Experiment)


def test_every_setting_says_what_it_means() -> None:
    def undescribed(model: type, prefix: str = "") -> list[str]:
        fields = model.model_fields  # type: ignore[attr-defined]
        return [name for name, field in fields.items() if not field.description and not hasattr(field.annotation, "model_fields")] + [
            name for field in fields.values() if hasattr(field.annotation, "model_fields") for name in undescribed(field.annotation)
        ]

    assert undescribed(Experiment) == []


def test_harmless_settings_exist() -> None:
    assert set(flatten(Experiment().model_dump())) >= HARMLESS


def test_command_line_beats_the_file(tmp_path: Path) -> None:
    config = write(tmp_path, "seed: 1\nfinetune: {labels: 40, steps: 10}\n")
    experiment = load_experiment(config, ["seed=5", "finetune.labels=10%", "pretrain.optimizer.lr=1e-3", "evaluate.knn.k=[1, 3]"])
    assert experiment.seed == 5
    assert experiment.finetune.labels == "10%"
    assert experiment.finetune.steps == 10
    assert experiment.pretrain.optimizer.lr == 1e-3
    assert experiment.evaluate.knn.k == [1, 3]


def test_last_override_wins() -> None:
    assert load_experiment("digits", ["seed=1", "seed=2"]).seed == 2


def test_method_name_replaces_the_block(tmp_path: Path) -> None:
    config = write(tmp_path, "pretrain: {method: {name: moco_v2, temperature: 0.3}}\n")
    assert load_experiment(config, ["pretrain.method=simclr"]).pretrain.method == {"name": "simclr"}


def test_method_key_edits_the_block(tmp_path: Path) -> None:
    config = write(tmp_path, "pretrain: {method: {name: simclr, temperature: 0.3}}\n")
    assert load_experiment(config, ["pretrain.method.temperature=0.1"]).pretrain.method == {"name": "simclr", "temperature": 0.1}
    short = write(tmp_path, "pretrain: {method: simclr}\n")
    assert load_experiment(short, ["pretrain.method.temperature=0.1"]).pretrain.method == {"name": "simclr", "temperature": 0.1}


def test_method_key_edits_the_default_method(tmp_path: Path) -> None:
    config = write(tmp_path, "seed: 1\n")
    assert load_experiment(config, ["pretrain.method.temperature=0.1"]).pretrain.method == {"name": "moco_v2", "temperature": 0.1}
    assert load_experiment(config, ["finetune.method.threshold=0.9"]).finetune.method == {"name": "fixmatch", "threshold": 0.9}


@pytest.mark.parametrize(
    ("text", "views"),
    [
        ("weak", [{"name": "weak"}]),
        ("weak/strong", [{"name": "weak"}, {"name": "strong"}]),
        ("{name: weak, shift: 2}", [{"name": "weak", "shift": 2}]),
        ("[weak, {name: strong}]", [{"name": "weak"}, {"name": "strong"}]),
        ("auto", "auto"),
    ],
)
def test_spellings_of_views(text: str, views: object) -> None:
    assert load_experiment("digits", [f"finetune.views={text}"]).finetune.views == views


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pretrain.epoch=3", ["pretrain.epoch", "did you mean 'epochs'"]),
        ("pretrian.epochs=3", ["pretrian", "did you mean 'pretrain'"]),
        ("a.b=3", ["'a'", "known are", "finetune"]),
        ("pretrain.epochs=abc", ["pretrain.epochs", "'abc'", "number"]),
        ("pretrain.epochs=0", ["pretrain.epochs", "greater than 0"]),
        ("pretrain.batch_size=1", ["pretrain.batch_size", "greater than or equal to 2"]),
        ("finetune.batch_size=1", ["finetune.batch_size", "greater than or equal to 2"]),
        ("pretrain.optimizer.lr=.inf", ["pretrain.optimizer.lr", "finite"]),
        ("pretrain.optimizer.name=adam", ["pretrain.optimizer.name", "'adam'", "'adamw'"]),
        ("data.image_size=3", ["data.image_size", "greater than or equal to 8"]),
        ("data.channels=2", ["data.channels", "'auto' or be 1 or 3"]),
        ("data=3", ["data = 3"]),
        ("finetune.labels=10%%", ["finetune.labels", "10%%"]),
        ("finetune.labels=-3", ["finetune.labels", "-3"]),
        ("finetune.baselines=[x]", ["finetune.baselines.0", "'x'", "'all_labels'"]),
        ("evaluate.knn.k=[1, a]", ["evaluate.knn.k.1", "'a'"]),
        ("evaluate.cross_validate=1", ["evaluate.cross_validate = 1", "0 or be greater than or equal to 2"]),
        ("evaluate.cross_validate=-1", ["evaluate.cross_validate = -1"]),
        ("evaluate.knn.k=[]", ["evaluate.knn.k = []", "at least 1 item"]),
        ("evaluate.linear.strengths=[]", ["evaluate.linear.strengths = []", "at least 1 item"]),
        ("evaluate.linear.strengths=[1e308]", ["evaluate.linear.strengths.0", "less than or equal to 1000000"]),
        ("evaluate.bootstrap=99999999999999", ["evaluate.bootstrap", "less than or equal to 1000000"]),
        ("evaluate.batch_size=99999999999999999999", ["evaluate.batch_size", "less than or equal to 1000000000"]),
        ("pretrain.epochs=1e308", ["pretrain.epochs", "less than or equal to 1000000"]),
        ("pretrain.monitor_epochs=1e308", ["pretrain.monitor_epochs", "less than or equal to 1000000"]),
        ("pretrain.optimizer.lr=1e308", ["pretrain.optimizer.lr", "less than or equal to 1000000"]),
        ("pretrain.optimizer.weight_decay=1e308", ["pretrain.optimizer.weight_decay", "less than or equal to 1000000"]),
        ("finetune.backbone_lr_scale=1e308", ["finetune.backbone_lr_scale", "less than or equal to 1000000"]),
        ("data.mean=[124, 116, 104]", ["data.mean", "less than or equal to 1"]),
        ("data.std=[1e-320]", ["data.std", "greater than or equal to 0.0001"]),
        ("seed=", ["seed", "integer"]),
        ("seed=2026-02-30", ["seed=2026-02-30", "not valid YAML (day is out of range for month)"]),
        pytest.param(f"seed={'9' * 5000}", ["seed=999", "not valid YAML (Exceeds the limit"], id="seed of 5000 digits"),
        ("pretrain.epochs=[", ["pretrain.epochs=[", "not valid YAML"]),
        ("pretrain.epochs=\x01", ["pretrain.epochs=", "not valid YAML"]),
        ("pretrain.views={name: moco_v2, name: simclr}", ["pretrain.views=", "the key 'name' is given twice"]),
        ("finetune.labels", ["finetune.labels", "key=value"]),
        ("seed.x=3", ["seed", "cannot be set"]),
    ],
)
def test_every_mistake_is_one_sentence(override: str, words: list[str], tmp_path: Path) -> None:
    message = sentence(write(tmp_path, "seed: 1\n"), override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("seed: [", "not valid YAML"),
        ("seed: 2026-02-30", "not valid YAML"),
        ("- 1\n", "no mapping"),
        ("seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("sed: 1", "did you mean 'seed'"),
    ],
)
def test_broken_files_are_named(text: str, word: str, tmp_path: Path) -> None:
    message = sentence(write(tmp_path, text))
    assert "mine.yaml" in message
    assert word in message


def test_blocks_may_be_merged_by_yamls_merge_keys(tmp_path: Path) -> None:
    text = "pretrain: {optimizer: &first {name: sgd, lr: 0.1}}\nfinetune: {optimizer: {<<: *first, lr: 0.2}}\n"
    experiment = load_experiment(write(tmp_path, text))
    assert [(stage.optimizer.name, stage.optimizer.lr) for stage in (experiment.pretrain, experiment.finetune)] == [
        ("sgd", 0.1),
        ("sgd", 0.2),
    ]
    assert "the key 'lr' is given twice" in sentence(write(tmp_path, "pretrain: {optimizer: {<<: {name: sgd}, lr: 0.1, lr: 0.2}}\n"))


def test_an_override_of_a_block_that_an_alias_shares_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    config = write(tmp_path, "pretrain: {optimizer: &same {name: sgd, lr: 0.1}}\nfinetune: {optimizer: *same}\n")
    experiment = load_experiment(config, ["pretrain.optimizer.lr=0.2"])
    assert (experiment.pretrain.optimizer.lr, experiment.finetune.optimizer.lr) == (0.2, 0.1)


def test_a_block_that_is_merged_further_before_it_is_read_itself_repeats_no_key(tmp_path: Path) -> None:
    text = (
        "pretrain: {method: {teacher: &second {<<: &first {norm: bn, momentum: 0.9}, momentum: 0.99}}}\n"
        "finetune: {method: {<<: {teacher: *first}, name: mean_teacher}, optimizer: {<<: *second, name: sgd, lr: 0.1}}\n"
    )
    assert "unknown key 'finetune.optimizer.norm'" in sentence(write(tmp_path, text))
    experiment = load_experiment(write(tmp_path, text.replace("norm: bn, ", "")))
    assert experiment.pretrain.method["teacher"] == {"momentum": 0.99}
    assert experiment.finetune.method == {"teacher": {"momentum": 0.9}, "name": "mean_teacher"}
    assert experiment.finetune.optimizer.momentum == 0.99


def test_unknown_config() -> None:
    assert "did you mean 'digits'" in sentence("digit")
    assert "no config file nothing.yaml" in sentence("nothing.yaml")


def test_config_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "mine.yaml" in sentence(str(path))


def test_no_python_objects_from_yaml(tmp_path: Path) -> None:
    assert "not valid YAML" in sentence(write(tmp_path, "seed: !!python/object/apply:os.getpid []\n"))


def test_settings_of_a_run_are_a_config(tmp_path: Path) -> None:
    settings = Experiment(seed=3).model_dump(mode="json")
    config = write(tmp_path, yaml.safe_dump({**settings, "provenance": {"commit": "abc"}}))
    assert load_experiment(config) == Experiment(seed=3)


def test_experiment_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Experiment().seed = 1  # type: ignore[misc]
