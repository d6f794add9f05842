"""Every `auto` becomes a number with a reason; what cannot be is refused before anything is made."""

from dataclasses import replace

import numpy as np
import pytest
import yaml

from modicum import small_data
from modicum.config import flatten, load_experiment
from modicum.data.images import UNKNOWN, Images
from modicum.data.sources import load_images
from modicum.errors import InputError
from modicum.evaluate.results import reproduction
from modicum.explain import commented
from modicum.method import find_method
from modicum.resolve import Reason, resolve, view_arguments
from modicum.session import make_request
from modicum.settings import AUTO, Experiment
from modicum.views.policies import build_policy


def resolved(digits: Images, *overrides: str) -> tuple[Experiment, dict[str, Reason]]:
    experiment, reasons = resolve(load_experiment("digits", overrides), digits)
    return experiment, {reason.key: reason for reason in reasons}


def test_nothing_stays_auto_but_what_depends_on_the_machine(digits: Images) -> None:
    experiment, reasons = resolved(digits)
    left = {key for key, value in flatten(experiment.model_dump()).items() if value == AUTO}
    assert left <= {
        "device",
        "precision",
        "backbone.stem",
        "compile",
        "data.cache",
        "data.test_fraction",
        "pretrain.method.teacher.groups",
        "finetune.method.teacher.groups",
    }
    assert all(reason.why for reason in reasons.values())


def test_resolving_again_changes_nothing(digits: Images) -> None:
    experiment, _ = resolved(digits)
    assert resolve(experiment, digits) == (experiment, [])


def test_the_paper_holds_where_it_fits_and_the_largest_that_does_elsewhere(digits: Images) -> None:
    experiment, reasons = resolved(digits, "pretrain.method=moco_v2")
    size = experiment.pretrain.method["queue_size"]
    assert size < 1347 / 2 < 2 * size
    assert "65536" in reasons["pretrain.method.queue_size"].why


@pytest.fixture
def all_data_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_data, "SMALL_DATA", 0)


def test_the_learning_rate_is_scaled_to_the_batch_and_shown_as_a_number(digits: Images, all_data_is_large: None) -> None:
    experiment, _ = resolved(digits, "pretrain.method=simclr", "pretrain.optimizer={}", "pretrain.batch_size=128")
    assert (experiment.pretrain.optimizer.name, experiment.pretrain.optimizer.lr) == ("lars", pytest.approx(0.15))


@pytest.mark.parametrize(
    ("method", "batch", "scaling", "lr", "why"),
    [
        ("simclr", 64, "auto", 0.075, "linear scaling: 0.3 * 64 / 256"),
        ("simclr", 64, "sqrt", 0.6, "square-root scaling: 1.2 * sqrt(64 / 256)"),  # 0.075 sqrt(B) of the paper
        ("simclr_v2", 64, "auto", 0.8, "square-root scaling: 6.4 * sqrt(64 / 4096)"),  # 0.1 sqrt(B) of the paper
        ("moco_v2", 64, "none", 0.03, "that for 256 images, unscaled"),
    ],
)
def test_the_learning_rate_is_scaled_by_one_formula_or_another(
    digits: Images, all_data_is_large: None, method: str, batch: int, scaling: str, lr: float, why: str
) -> None:
    section = f"pretrain={{method: {method}, batch_size: {batch}, optimizer: {{scaling: {scaling}}}}}"
    experiment, reasons = resolved(digits, section)
    assert experiment.pretrain.optimizer.lr == pytest.approx(lr)
    assert reasons["pretrain.optimizer.lr"].why == why
    assert resolve(experiment, digits) == (experiment, [])


@pytest.mark.parametrize("method", ["moco_v1", "simclr", "swav", "dino"])
def test_small_data_have_defaults_that_were_found_on_small_data(digits: Images, method: str) -> None:
    experiment, reasons = resolved(digits, f"pretrain={{method: {method}}}")
    stage = experiment.pretrain
    assert (stage.batch_size, stage.optimizer.name, stage.optimizer.lr) == (128, "adamw", 0.002)
    assert stage.warmup_epochs == 3  # of 100
    assert "fewer than 50,000" in reasons["pretrain.optimizer.name"].why
    crops = [build_policy(view, **view_arguments(experiment.data)).recipe for view in stage.views]  # type: ignore[arg-type, union-attr]
    assert {crop.crop_scale for crop in crops if not crop.size} == {(0.4, 1)}
    assert resolve(experiment, digits) == (experiment, [])


def test_small_data_leave_what_was_asked_for_alone(digits: Images, all_data_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "{method: moco_v2, batch_size: 256, views: moco_v2, optimizer: {lr: 0.1}}"
    large = resolved(digits, f"pretrain={asked}")[0]
    monkeypatch.undo()
    assert resolved(digits, f"pretrain={asked}")[0] == large
    assert large.pretrain.optimizer.name == "sgd"


def test_large_data_have_the_papers_constants(digits: Images, all_data_is_large: None) -> None:
    stage = resolved(digits, "pretrain={method: moco_v2}")[0].pretrain
    assert (stage.batch_size, stage.optimizer.name, stage.optimizer.lr, stage.warmup_epochs) == (256, "sgd", 0.03, 0)
    assert stage.views == [{"name": "moco_v2"}] * 2


@pytest.mark.parametrize(
    ("override", "start", "why", "finish", "why_last"),
    [
        ("finetune.method=fixmatch", "propagate", "the start decides", "propagate", "know more than the head"),
        ("finetune.method=supervised", "none", "from labels alone", "none", "from labels alone"),
        ("finetune.method=propagate", "none", "what the method does", "none", "what the method does"),
        ("finetune.init=random", "none", "no neighbours", "propagate", "know more than the head"),
        ("finetune.backbone_lr_scale=0", "propagate", "the start decides", "none", "stays as it is"),
        ("finetune.labels=all", "none", "without a label", "none", "without a label"),
        ("finetune.labels=1000", "propagate", "the start decides", "average", "knows as much as neighbours"),
        ("finetune.labels=10%", "propagate", "the start decides", "propagate", "know more than the head"),
        ("finetune={warm_start: none, finish: none}", "none", None, "none", None),
    ],
)
def test_labels_are_propagated_where_a_backbone_knows_neighbours(
    digits: Images, override: str, start: str, why: str | None, finish: str, why_last: str | None
) -> None:
    experiment, reasons = resolved(digits, override)
    assert (experiment.finetune.warm_start, experiment.finetune.finish) == (start, finish)
    assert why is None or why in reasons["finetune.warm_start"].why
    assert why_last is None or why_last in reasons["finetune.finish"].why


def test_a_head_of_many_labels_stays_as_it_is(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modicum.resolve.MANY_A_CLASS", 100)
    experiment, reasons = resolved(digits, "finetune.labels=1000")
    assert (experiment.finetune.warm_start, experiment.finetune.finish) == ("propagate", "none")
    assert "not known to add" in reasons["finetune.finish"].why


def test_all_the_labels_that_a_few_images_have_are_few_labels(digits: Images) -> None:
    few = digits.labels.copy()
    few[np.r_[50 : len(few)]] = UNKNOWN
    for labels, found in ((few, "propagate"), (np.full(len(few), UNKNOWN), "none")):
        experiment, _ = resolve(
            load_experiment("digits", ["finetune.labels=all"]), replace(digits, manifest=digits.manifest.assign(label=labels))
        )
        assert (experiment.finetune.warm_start, experiment.finetune.finish) == (found, found)


def test_no_one_waits_for_neighbours_among_very_many_images_unasked(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modicum.resolve.MOST_PROPAGATED", 1000)
    assert resolved(digits)[0].finetune.warm_start == "none"
    assert resolved(digits, "finetune.warm_start=propagate")[0].finetune.warm_start == "propagate"


def test_a_batch_size_that_is_asked_for_is_another_experiment_than_one_left_out() -> None:
    left_out, asked_for = "pretrain={method: moco_v2}", "pretrain={method: moco_v2, batch_size: 256}"
    assert len({make_request("digits", [override]).fingerprint("pretrain") for override in (left_out, asked_for)}) == 2
    assert "pretrain.batch_size=256" in reproduction("digits", load_experiment("digits", [asked_for]))[1]


def test_a_config_whose_data_are_not_there_leaves_batch_sizes_open() -> None:
    again = Experiment.model_validate(yaml.safe_load(commented(load_experiment("folder"))))
    assert (again.pretrain.batch_size, again.finetune.batch_size, again.finetune.mu) == ("auto", "auto", "auto")


def test_one_training_image_is_refused(digits: Images) -> None:
    one = Images("one", digits.pixels[:1], digits.manifest[:1].assign(split="train"), digits.class_names, digits.mirror)
    with pytest.raises(InputError, match=r"one training image, and nothing to compare it with: set data\.root"):
        resolve(load_experiment("digits", ["pretrain={}"]), one)


def test_batches_of_stage_two_that_are_left_out_fit_the_data(digits: Images) -> None:
    few = Images("few", digits.pixels[:40], digits.manifest[:40].assign(split="train"), digits.class_names, digits.mirror)
    settings = resolve(load_experiment("digits", ["pretrain={}", "finetune={}"]), few)[0].finetune
    assert (settings.batch_size, settings.mu) == (5, 7)


@pytest.mark.parametrize("count", [9, 10, 107, 116, 127])
def test_a_batch_that_is_left_out_can_be_shuffled_in_groups(digits: Images, count: int) -> None:
    few = Images("few", digits.pixels[:count], digits.manifest[:count].assign(split="train"), digits.class_names, digits.mirror)
    overrides = ["pretrain={method: {name: moco_v2, teacher: {norm: shuffle_bn}}}", "finetune={}"]
    settings = resolve(load_experiment("digits", overrides), few)[0].pretrain
    assert count / 2 - 2 < settings.batch_size <= count / 2
    assert settings.batch_size % settings.method["teacher"]["groups"] == 0


def test_batches_of_stage_two_fit_the_images_that_give_no_label(digits: Images) -> None:
    settings = resolve(load_experiment("digits", ["finetune={labels: 1300, labelled_in_unlabelled: false}"]), digits)[0].finetune
    assert settings.batch_size * settings.mu <= 47


def test_what_is_ignored_for_the_sake_of_a_comparison_is_warned_of(digits: Images, capsys: pytest.CaptureFixture[str]) -> None:
    resolved(digits, "finetune.method=supervised")
    assert "finetune.mu = 12 does nothing: supervised sees no unlabelled image" in capsys.readouterr().err


def test_simclrs_temperature_is_that_of_small_images_or_of_large_ones(digits: Images) -> None:
    assert resolved(digits, "pretrain.method=simclr")[0].pretrain.method["temperature"] == 0.5
    assert resolved(digits, "pretrain.method=simclr_v2")[0].pretrain.method["temperature"] == 0.1


@pytest.mark.parametrize(("epochs", "start"), [(100, 15), (12, 3)])
def test_swavs_queue_is_used_in_short_runs_too(digits: Images, epochs: int, start: float) -> None:
    experiment, _ = resolved(digits, f"pretrain={{method: {{name: swav, queue_size: 512}}, epochs: {epochs}}}")
    assert experiment.pretrain.method["queue_epochs"] == pytest.approx(start, abs=0.1)
    assert resolve(experiment, digits) == (experiment, [])


def test_what_a_method_decides_keeps_the_bounds_of_its_settings(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = {"temperature": (-1.0, "a mistake")}
    monkeypatch.setattr(find_method("pretrain", "simclr"), "decide", lambda settings, facts: mistake)
    with pytest.raises(InputError, match=r"^pretrain\.method simclr: pretrain\.method\.temperature = -1\.0 is not possible"):
        resolved(digits, "pretrain={method: simclr}")


def test_what_keeps_small_images_from_staying_together_is_on_for_small_images_alone(digits: Images) -> None:
    pixels = digits.pixels[:400].repeat_interleave(12, dim=2).repeat_interleave(12, dim=3)
    large_images = Images("large", pixels, digits.manifest[:400], digits.class_names, digits.mirror)
    small, reasons = resolved(digits, "pretrain.method=swav")
    large, _ = resolved(large_images, "pretrain.method=swav")
    assert [e.pretrain.method["epsilon"] for e in (small, large)] == [0.02, 0.05]
    assert "close together" in reasons["pretrain.method.epsilon"].why
    choices = [(digits, "resnet18"), (large_images, "resnet18"), (digits, "vit_tiny_patch16_224")]
    heads = [
        resolved(images, "pretrain={method: dino}", f"backbone.name={name}")[0].pretrain.method["head_norm"] for images, name in choices
    ]
    assert heads == [True, False, False]


def test_a_transformer_has_the_papers_settings_for_transformers(digits: Images, all_data_is_large: None) -> None:
    convolutional, _ = resolved(digits, "pretrain={method: moco_v3}")
    transformer, reasons = resolved(digits, "pretrain={method: moco_v3}", "backbone.name=vit_tiny_patch16_224")
    assert [e.pretrain.method["temperature"] for e in (convolutional, transformer)] == [1.0, 0.2]
    assert [e.pretrain.optimizer.name for e in (convolutional, transformer)] == ["lars", "adamw"]
    assert [e.pretrain.method["frozen_patches"] for e in (convolutional, transformer)] == [False, True]
    assert "transformers" in reasons["pretrain.method.temperature"].why


def test_a_method_of_fewer_views_takes_the_first_of_the_configs(digits: Images) -> None:
    given = "finetune.views=[none, strong]", "finetune.labelled_views=[weak, none]"
    experiment, reasons = resolved(digits, "finetune.method=supervised", *given)
    assert (experiment.finetune.views, experiment.finetune.labelled_views) == ([{"name": "none"}], [{"name": "weak"}])
    assert all("takes 1" in reasons[f"finetune.{key}"].why for key in ("views", "labelled_views"))


@pytest.mark.parametrize("name", ["comatch", "conmatch", "remixmatch"])
def test_a_method_of_more_strong_views_takes_the_last_again(digits: Images, name: str) -> None:
    experiment, reasons = resolved(digits, f"finetune.method={name}", "finetune.views=[none, {name: strong, cutout: 0.2}]")
    assert experiment.finetune.views == [{"name": "none"}, *[{"name": "strong", "cutout": 0.2}] * 2]
    assert "takes 3" in reasons["finetune.views"].why


@pytest.mark.parametrize(
    ("optimizer", "momentum", "nesterov"),
    [("name: adamw", 0.0, False), ("name: lars", 0.9, False), ("name: sgd", 0.9, True), ("name: sgd, momentum: 0", 0.0, False)],
)
def test_an_optimizer_has_no_setting_that_it_would_ignore(digits: Images, optimizer: str, momentum: float, nesterov: bool) -> None:
    found = resolved(digits, f"finetune.optimizer={{{optimizer}, lr: 0.01}}")[
        0
    ].finetune.optimizer  # FixMatch's own is SGD with Nesterov momentum
    assert (found.momentum, found.nesterov) == (momentum, nesterov)


def test_a_warmup_may_last_the_whole_run(digits: Images) -> None:
    assert resolved(digits, "pretrain.epochs=3", "pretrain.warmup_epochs=3", "finetune.steps=20", "finetune.warmup_steps=20")


def test_one_policy_for_all_views_leaves_local_crops_small(digits: Images) -> None:
    experiment, _ = resolved(digits, "pretrain.method=swav", "pretrain.views={name: moco_v2, crop_scale: [0.5, 1]}")
    views = experiment.pretrain.views
    assert views[:2] == [{"name": "moco_v2", "crop_scale": [0.5, 1]}] * 2
    assert views[2:] == [{"name": "moco_v2", "crop_scale": (0.2, 0.5), "size": 8}] * 6
    experiment, _ = resolved(digits, "pretrain.method=swav", "pretrain.views=swav/swav/swav_local")
    assert [view["name"] for view in experiment.pretrain.views] == ["swav", "swav", "swav_local"]


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        ("{name: vit_tiny_patch16_224}", "cuts images into patches of 2 px, which do not tile a view of 9 px"),
        ("{name: mixer_s16_224, stem: standard}", "takes images of one size alone; set the size of every view to 16"),
    ],
)
def test_crops_that_the_network_does_not_take_are_refused(backbone: str, sentence: str) -> None:
    crops = "pretrain={method: dino, views: [{name: dino_a}, {name: dino_b}, {name: dino_local, size: 9}]}"
    with pytest.raises(InputError, match=sentence):
        resolved(load_images(load_experiment("digits", ["data.image_size=16"]).data), crops, f"backbone={backbone}", "data.image_size=16")


def test_crops_of_which_a_deep_network_leaves_nothing_are_refused() -> None:
    images = load_images(load_experiment("digits", ["data.image_size=32"]).data)
    with pytest.raises(InputError, match=r"pretrain\.views: vgg11 makes no features of views of 12 px; choose larger ones"):
        resolved(images, "pretrain={method: swav}", "backbone.name=vgg11", "data.image_size=32")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pretrain.method=mocov2", "unknown method 'mocov2': did you mean 'moco_v2'"),
        ("pretrain.method.temprature=1", "unknown key 'pretrain.method.temprature': did you mean 'temperature'"),
        ("pretrain.method.temperature=-1", "pretrain.method.temperature = -1 is not possible"),
        ("pretrain.method.temperature=.inf", "pretrain.method.temperature = inf is not possible"),
        (
            "data={name: digits, mean: [0.5, 0.5, 0.5]}",
            "data.mean = [0.5, 0.5, 0.5] is not one number a channel, of which the images have 1",
        ),
        ("data={name: digits, std: [0.5, 0.5, 0.5]}", "data.std = [0.5, 0.5, 0.5] is not one number a channel"),
        ("data={name: digits, mean: []}", "data.mean = [] is not one number a channel"),
        ("pretrain.method.queue_size=100000", "queue_size = 100000 is larger than the data set of 1347 images"),
        ("pretrain.method.teacher={norm: shuffle_bn, groups: 1}", "changes nothing"),
        ("pretrain.method.teacher={norm: shuffle_bn, groups: 7}", "batch_size = 128 is not: choose a multiple of 7"),
        ("pretrain={norm: sync_bn, method: {name: moco_v2, teacher: {norm: shuffle_bn}}}", "does not go with teacher.norm = shuffle_bn"),
        ("pretrain.batch_size=5000", "batch_size = 5000 is larger than the 1347 training images"),
        ("pretrain.views=simclr/simclr/simclr", "names 3 policies, but moco_v2 takes 2 views"),
        ("pretrain.views={name: simclr, crop_scal: [0.1, 1]}", "crop_scale"),
        ("pretrain={method: swav, views: [{name: swav}, {name: swav, size: 24}]}", "size = 24 is larger than the images of 12 px"),
        ("pretrain={method: {name: swav, queue_size: 5000}}", "queue_size = 5000 is larger than the data set of 1347 images"),
        ("pretrain={method: w_mse, views: [w_mse]}", "Unknown view policy 'w_mse'"),
        ("pretrain={method: {name: w_mse, sub_batch: 512}}", "sub_batch = 512 is larger than batch_size = 128"),
        ("pretrain={method: w_mse, batch_size: 3}", "pretrain.batch_size = 3 is too few images for w_mse to whiten; choose 4 or more."),
        ("pretrain={method: {name: w_mse, sub_batch: 64, embedding_size: 64}}", "covariance is singular"),
        ("finetune.method.teacher={norm: shuffle_bn}", "norm = shuffle_bn has no use in fixmatch, which contrasts no query"),
        (
            "pretrain.method={name: byol, teacher: {norm: shuffle_bn}}",
            "no use in byol, which contrasts no query with other keys: choose bn, ",
        ),
        ("pretrain.method={name: moco_v2, teacher: {norm: eman, groups: 4}}", "teacher.groups = 4 would do nothing"),
        ("pretrain={batch_size: 3, method: {name: moco_v2, teacher: {norm: shuffle_bn}}}", "from 4 on, or norm: eman"),
        (
            "pretrain={batch_size: 4, method: {name: moco_v2, teacher: {norm: shuffle_bn, groups: 8}}}",
            "choose a multiple of 8, from 16 on",
        ),
        ("pretrain.method={name: swav, queue_epochs: 3}", "queue_epochs = 3 would do nothing without a queue"),
        (
            "pretrain={method: {name: swav, queue_size: 512, queue_epochs: 15}, epochs: 10}",
            "queue_size = 512 would do nothing: full, and after its queue_epochs, it would serve from step 158 on, and the run has 106",
        ),
        (
            "pretrain={method: {name: swav, queue_size: 1000}, epochs: 0.5}",
            "queue_size = 1000 would do nothing: full, and after its queue_epochs, it would serve from step 8 on, and the run has 6",
        ),
        ("pretrain.method={name: moco_v3, frozen_patches: true}", "the backbone is no transformer"),
        (
            "pretrain={method: simclr, views: [{name: simclr}, {name: simclr, size: 8}]}",
            "sides of 8 and 12 px, but simclr passes all views",
        ),
        ("finetune.views=[weak, {name: moco_v2, size: 8}]", "finetune.views have sides of 8 and 12 px"),
        ("finetune={labels: all, labelled_in_unlabelled: false}", "labelled_in_unlabelled = false leaves no unlabelled image"),
        (
            "finetune={labels: 1300, labelled_in_unlabelled: false, batch_size: 7, mu: 7}",
            "49 unlabelled images a step, is more than the 47 unlabelled images",
        ),
        ("finetune.batch_size=2000", "finetune.batch_size = 2000 with mu = 12, 24000 unlabelled images a step, is more than the 1347"),
        ("finetune={method: supervised, batch_size: 2000}", "finetune.batch_size = 2000 is more than the 1347 training images"),
        (
            "finetune.method={name: pseudo_label, ramp_start: 0.7}",
            "ramp_start = 0.7 lies behind ramp_end = 0.6, and the weight rises from the one to the other: choose a ramp_end from 0.7 to 1",
        ),
        ("finetune.method={name: vat, teacher: {norm: eman}}", "unknown key 'finetune.method.teacher'"),
        ("finetune.method={name: mean_teacher, teacher: none}", "finetune.method.teacher = 'none' is not possible"),
        ("finetune.method.threshold=0", "threshold = 0 is not possible"),
        ("backbone={name: mixer_s16_224, stem: small}", "backbone.stem = small is not known for mixer_s16_224"),
        ("finetune.projector_layers=1", "projector_layers = 1 keeps a layer of simclr_v2's projector; pretrain.method is moco_v2"),
        ("finetune.projector_layers=2", "finetune.projector_layers = 2 is not possible"),
        ("pretrain.optimizer={name: adamw, lr: 0.003, scaling: sqrt}", "scaling = sqrt would do nothing, since lr = 0.003 is given"),
        ("finetune.method={name: fixmatch, weak_in_batch: true, teacher: {norm: eman}}", "weak_in_batch"),
        ("finetune.method.threshold=1.5", "threshold = 1.5 is not possible"),
        ("backbone.name=resnet19", "did you mean resnet18"),
        ("pretrain.optimizer.nesterov=true", "pretrain.optimizer.nesterov = True would do nothing, since adamw has none"),
        ("pretrain.optimizer={name: lars, nesterov: true}", "nesterov = True would do nothing, since lars has none"),
        ("finetune.optimizer={name: sgd, momentum: 0, nesterov: true}", "since sgd with momentum 0 has none"),
        (
            "pretrain={method: simclr, optimizer: {name: sgd}}",
            "pretrain.optimizer.name = sgd needs a learning rate: simclr's own is one for lars",
        ),
        ("finetune.optimizer.momentum=0.8", "finetune.optimizer.momentum = 0.8 would do nothing, since adamw has none"),
        ("pretrain.epochs=2", "pretrain.warmup_epochs = 3 is longer than the run of 2 epochs: choose 2 or less"),
        ("finetune.steps=19", "finetune.warmup_steps = 20 is longer than the run of 19 steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(digits: Images, override: str, sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        resolved(digits, override)
    assert sentence in str(refusal.value)


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # announced by a launcher, not yet joined: settings are refused before


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "pretrain.batch_size = 128 cannot be dealt evenly to 3 ranks: choose a multiple of 3."),
        (["pretrain.batch_size=3"], "pretrain.batch_size = 3 leaves each of 3 ranks one image, which has no variance: choose more."),
        (["pretrain.batch_size=240"], "finetune.batch_size = 16 cannot be dealt evenly to 3 ranks: choose a multiple of 3."),
        (
            ["pretrain.batch_size=240", "pretrain.method.teacher={norm: shuffle_bn, groups: 4}"],
            "teacher.groups = 4 cannot be dealt evenly to 3 ranks: choose a multiple of 3.",
        ),
    ],
)
def test_ranks_that_do_not_divide_a_batch_are_refused(digits: Images, three_ranks: None, overrides: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as refusal:
        resolved(digits, *overrides)
    assert str(refusal.value) == sentence


def test_groups_left_auto_are_dealt_evenly_to_the_ranks(digits: Images, three_ranks: None) -> None:
    experiment, _ = resolved(
        digits, "pretrain.batch_size=240", "finetune.batch_size=66", "pretrain.method={name: moco_v2, teacher: {norm: shuffle_bn}}"
    )
    assert experiment.pretrain.method["teacher"]["groups"] == 3


@pytest.mark.parametrize(
    ("override", "leaks"),
    [
        ("pretrain.method={name: moco_v2, teacher: {norm: sync_bn}}", True),
        ("pretrain={norm: sync_bn, method: {name: moco_v2, teacher: {norm: bn}}}", True),
        ("pretrain={norm: sync_bn, method: {name: moco_v2, teacher: {norm: eman}}}", False),
        ("pretrain.method={name: byol, teacher: {norm: sync_bn}}", False),
    ],
)
def test_a_queue_under_sync_bn_is_warned_of(digits: Images, override: str, leaks: bool, capsys: pytest.CaptureFixture[str]) -> None:
    resolved(digits, override)
    assert ("without seeing the images" in capsys.readouterr().err) == leaks


def test_labelled_views_are_the_first_of_the_views_unless_given(digits: Images) -> None:
    settings = resolved(digits, "finetune.views=[weak, strong]", "finetune.labelled_views=auto")[0].finetune
    assert [policy["name"] for policy in settings.labelled_views] == ["weak"]
    own = resolved(digits, "finetune.views=[none, strong]", "finetune.labelled_views={name: weak, shift: 0.25}")[0].finetune
    assert own.labelled_views == [{"name": "weak", "shift": 0.25}]
    assert [policy["name"] for policy in own.views] == ["none", "strong"]
    twice = resolved(digits, "finetune.method=mean_teacher", "finetune.views=weak", "finetune.labelled_views=strong")[0].finetune
    assert [policy["name"] for policy in twice.labelled_views] == ["strong", "strong"]
