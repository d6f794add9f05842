"""The settings of an experiment: each named once, here, with type, default and meaning.

A method's own settings are the keyword arguments of its class; they are checked when the run is resolved (`resolve.py`).
Nothing heavy is imported: a finished run must be able to say so at once.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

AUTO: Any = "auto"
Auto = Literal["auto"]
# Upper bounds are far above all use: torch and numpy fail with more, often only after hours.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Several = Annotated[int, Field(ge=2, le=1_000_000_000)]  # which have a variance
Fraction = Annotated[float, Field(ge=0, le=1)]
Norm = Literal["bn", "sync_bn"]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]


def _named(value: Any, default: str) -> Any:
    """NAME or a mapping -> a mapping with `name`, which is the default's where only other keys are given."""
    return {"name": value} if isinstance(value, str) else {"name": default} | value if isinstance(value, dict) else value


Spec = str | dict[str, Any]  # NAME, or {name: NAME, KEY: value}
PretrainMethod = Annotated[dict[str, Any], BeforeValidator(partial(_named, default="moco_v2"), json_schema_input_type=Spec)]
FinetuneMethod = Annotated[dict[str, Any], BeforeValidator(partial(_named, default="fixmatch"), json_schema_input_type=Spec)]


def _views(value: Any) -> Any:
    """`weak/strong`, one policy with edits, or a list of either -> a list of `{name: POLICY, KEY: v}`, one a view."""
    if value == "auto":
        return value
    parts = value.split("/") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return [{"name": part} if isinstance(part, str) else part for part in parts]


Views = Annotated[Auto | list[dict[str, Any]], BeforeValidator(_views, json_schema_input_type=Spec | list[Spec])]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class DataSettings(Settings):
    name: str = Field("folder", description="digits, fashion_mnist, cifar10, cifar100, stl10, svhn, eurosat or folder")
    root: Path | None = Field(None, description="where the images lie, or where a built-in set is kept or downloaded to")
    labels: Path | None = Field(None, description="for folder: a CSV of path, label and optionally split")
    path_column: str = Field("path", description="header of the CSV's column of paths, relative to root")
    label_column: str = Field("label", description="header of the CSV's column of labels")
    split_column: str = Field("split", description="header of the CSV's optional column of train or test")
    image_size: Auto | Annotated[int, Field(ge=8, le=1024)] = Field("auto", description="side in pixels that images are resized to")
    channels: Auto | Literal[1, 3] = Field("auto", description="1 for grey images, 3 for colour")
    cache: Auto | Literal["disk", "none"] = Field(
        "auto", description="folder, decoded images: disk keeps them all, none reads files anew; auto: disk where there is room"
    )
    split_seed: int = Field(0, description="fixes which images are test, where the set has no split of its own")
    test_fraction: Auto | Annotated[float, Field(ge=0, lt=1)] = Field(
        "auto", description="share of the labelled images held out as test, where the set has no split of its own"
    )
    mirror: Auto | bool = Field("auto", description="whether views may flip images left to right (digits and text: no)")
    mean: Auto | list[Fraction] = Field("auto", description="normalisation, one number a channel, of pixels in 0..1")
    std: Auto | list[Annotated[float, Field(ge=1e-4, le=1)]] = Field("auto", description="normalisation, one number a channel")


class BackboneSettings(Settings):
    name: str = Field(
        "resnet10_small", description="resnet10_small, resnet10_tiny, resnet10d_tiny, resnet14d_tiny, or any architecture timm knows"
    )
    stem: Literal["auto", "small", "standard"] = Field("auto", description="small keeps the resolution of 8 to 64 px images")


class OptimizerSettings(Settings):
    name: Literal["auto", "sgd", "adamw", "lars"] = Field("auto", description="auto: the method's own")
    lr: Auto | Positive = Field("auto", description="peak learning rate of this very batch size, not of 256")
    scaling: Literal["auto", "linear", "sqrt", "none"] = Field("auto", description="of an lr left auto, from the paper's batch to this one")
    weight_decay: Auto | NotNegative = Field("auto", description="not applied to biases and norm layers")
    momentum: Auto | Annotated[float, Field(ge=0, lt=1)] = Field("auto", description="of SGD and LARS")
    nesterov: bool | Auto = Field("auto", description="of SGD")


class TeacherSettings(Settings):
    """The moving-average teacher of a method; `teacher: none` where a method can do without."""

    norm: Literal["bn", "shuffle_bn", "sync_bn", "eman"] = Field(
        "eman",
        description="bn: own batch statistics; shuffle_bn: of a permuted batch, in groups; sync_bn: of all ranks, the student too; "
        "eman: averaged statistics",
    )
    momentum: Auto | Annotated[float, Field(ge=0, lt=1)] = Field("auto", description="share of the teacher kept at each step")
    groups: Auto | Count = Field("auto", description="shuffle_bn: norm groups that a batch is split into, over all ranks")


class PretrainSettings(Settings):
    method: PretrainMethod = Field({"name": "moco_v2"}, description="NAME, or {name: NAME, KEY: value} with the method's settings")
    epochs: Positive = Field(100, description="times every training image is seen")
    batch_size: Auto | Several = Field("auto", description="images a step, over all ranks; auto: 256, and 128 for small data sets")
    norm: Norm = Field("bn", description="batch norm on several ranks, heads included: of each rank's images, or sync_bn, of all ranks'")
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: Literal["auto", "cosine", "step", "constant"] = Field("auto", description="learning rate over the run")
    warmup_epochs: Auto | NotNegative = Field("auto", description="epochs in which the learning rate rises")
    views: Views = Field("auto", description="policies of the views: auto, NAME, NAME/NAME, {name: NAME, KEY: value} or a list")
    init: str | None = Field(None, description="a backbone to start from; none: random weights")
    monitor_epochs: Auto | Positive = Field("auto", description="epochs between two readings of the online kNN and of the embeddings")
    log_every: Count = Field(20, description="steps between two rows of metrics.csv")


class FinetuneSettings(Settings):
    method: FinetuneMethod = Field({"name": "fixmatch"}, description="NAME, or {name: NAME, KEY: value} with the method's settings")
    labels: Count | Literal["all"] | Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")] = Field(
        "all", description='labels used: a total count, a share such as "10%", or all'
    )
    label_seed: int = Field(0, description="draws which images carry the labels")
    balance: Literal["class", "proportional"] = Field("class", description="labels per class: equal, or as the classes occur")
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the labels held out to watch training, from 20 labels a class up; below that none"
    )
    steps: Count = Field(1000, description="optimizer steps")
    batch_size: Auto | Several = Field("auto", description="labelled images a step, over all ranks; auto: 64, or what the data allow")
    mu: Auto | Count = Field("auto", description="unlabelled images a step for each labelled one; auto: 7, or what the data allow")
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="labelled images of a step: each as often as others, or each class as often as others"
    )
    labelled_in_unlabelled: bool = Field(True, description="labelled images are also part of the unlabelled set")
    norm: Norm = Field("bn", description="batch norm on several ranks, heads included: of each rank's images, or sync_bn, of all ranks'")
    optimizer: OptimizerSettings = OptimizerSettings()
    backbone_lr_scale: NotNegative = Field(1.0, description="the backbone's learning rate over the head's; 0 freezes it")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="learning rate of each backbone layer over that of the next")
    freeze_backbone: bool = Field(False, description="the backbone stays as it is, norm statistics too; heads alone learn")
    schedule: Literal["auto", "cosine", "cosine_7_16", "step", "constant"] = Field("auto", description="learning rate over the run")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps in which the learning rate rises")
    views: Views = Field("auto", description="policies of the unlabelled views, weak first")
    labelled_views: Views = Field("auto", description="policies of the labelled views, of baselines too; auto: the first of views")
    init: str = Field("pretrain", description="pretrain (this run's stage one), random, or a backbone folder or file")
    projector_layers: Literal[0, 1] = Field(0, description="layers of simclr_v2's projector that stay under the classifier")
    warm_start: Auto | Literal["none", "propagate"] = Field(
        "auto", description="the head before the first step: random, or fitted to labels propagated over the backbone's features"
    )
    finish: Auto | Literal["none", "propagate", "average"] = Field(
        "auto",
        description="the head after the last step: as trained, or fitted anew to labels propagated over the tuned backbone's features, "
        "or to the average of those and what the trained head says",
    )
    ema_momentum: Auto | Annotated[float, Field(ge=0, lt=1)] = Field(
        "auto", description="of the averaged weights that are evaluated, for methods without a teacher"
    )
    export: Auto | Literal["student", "ema", "eman"] = Field(
        "auto",
        description="weights of the classifier: student, the last; ema, averaged ones; eman, averaged ones and averaged norm statistics",
    )
    baselines: list[Literal["random", "pretrained", "all_labels"]] = Field(
        ["random", "pretrained", "all_labels"], description="supervised runs of the same length to compare with"
    )
    log_every: Count = Field(20, description="steps between two rows of metrics.csv")

    @property
    def frozen(self) -> bool:
        """Whether the backbone stays as it is."""
        return self.freeze_backbone or self.backbone_lr_scale == 0


class KnnSettings(Settings):
    k: list[Count] = Field(
        [1, 5, 10, 20, 50, 100, 200], min_length=1, description="neighbours that vote; those above the bank are left out"
    )
    temperature: Positive = Field(0.07, description="votes weigh exp(cosine / temperature)")
    whitened: bool = Field(True, description="kNN among whitened features too, beside kNN among the features as they are")
    approximate_from: Count = Field(500_000, description="images in a bank from which an inverted index is searched, not every image")


class LinearSettings(Settings):
    strengths: list[Positive] = Field(
        [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0], min_length=1, description="inverse regularisation C, chosen by validation on the labels"
    )
    max_iterations: Count = Field(200, description="of L-BFGS")


class EvaluateSettings(Settings):
    knn: KnnSettings = KnnSettings()
    linear: LinearSettings = LinearSettings()
    cross_validate: Literal[0] | Annotated[int, Field(ge=2)] = Field(
        0, description="refits of stage two, each without a part of the labels, to be judged on that part; 0: none"
    )
    bootstrap: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1000, description="resamples of the test images behind each 95 % interval")
    batch_size: Count = Field(512, description="images a step while features are extracted")
    gallery_queries: Annotated[int, Field(ge=0)] = Field(8, description="test images shown with their neighbours in the report")
    gallery_neighbours: Count = Field(10, description="neighbours shown a query")


class Experiment(Settings):
    seed: int = Field(0, description="initialisation, order of the images, views")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="of the networks; auto: bf16 where the hardware has it")
    compile: Auto | bool = Field(
        "auto",
        description="torch.compile of the backbone in training; auto: on several CPU threads, in stages of 10,000 steps or more",
    )
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


# Settings that move no result: a run folder accepts them changed.
HARMLESS = {
    "data.cache",
    "pretrain.log_every",
    "finetune.log_every",
    "evaluate.gallery_queries",
    "evaluate.gallery_neighbours",
    "evaluate.batch_size",
}
