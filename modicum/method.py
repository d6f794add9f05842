"""What a method is to the rest of the house: a module that turns a batch into a loss. Its file name is its name in a config."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_origin

from annotated_types import BaseMetadata
from pydantic import BaseModel, Field, create_model
from torch import Tensor, nn

from modicum import distributed
from modicum.config import did_you_mean, validate
from modicum.errors import InputError
from modicum.networks.norms import SyncBatchNorm, replace_norms
from modicum.networks.stems import SMALL_IMAGE
from modicum.optim import Pace, Recipe
from modicum.randomness import seeded
from modicum.settings import AUTO, Auto, Settings

if TYPE_CHECKING:
    from modicum.data.stream import Batch
    from modicum.networks import Backbone

Decisions = dict[str, tuple[Any, str]]  # setting -> value chosen for `auto`, and why


@dataclass(frozen=True)
class Facts:
    """What a method may know of the data and the run before it starts."""

    num_images: int  # training images, labelled or not
    num_classes: int
    image_size: int
    steps: int
    batch_size: int  # images a step; in stage two labelled ones
    norm: str = "bn"  # bn | sync_bn
    transformer: bool = False  # whether the backbone is built for one image size, cut into patches
    ema_momentum: float = 0.999  # stage two: of the average that is evaluated, for methods without a teacher
    num_labelled: int = 0  # images of the stream of that name; known once the labels are drawn, not when settings are decided
    num_unlabelled: int = 0
    class_shares: tuple[float, ...] = ()  # of the labels, by class

    def share_of_run(self, epochs: float) -> float:
        """The share of the run, at most 1, that the first `epochs` take."""
        return min(1.0, epochs * self.num_images / self.batch_size / self.steps)


@dataclass(frozen=True)
class Progress:
    """`step` steps are done of `steps`."""

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        return self.step / self.steps


@dataclass(frozen=True)
class Loss:
    """`total` is what is minimised; `parts` are its named summands, for the record. All are scalars on the device."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """Base of every method of both stages.

    A subclass is built as `SubClass(backbone, facts, seed, **settings)`; its keyword-only arguments are the settings that a
    config may give, each written once as `name: Annotated[type, bounds, "meaning"] = default`.
    """

    views: ClassVar[dict[str, tuple[str, ...]]]  # stream -> the policy of each of its views
    fewest_views: ClassVar[int | None] = None  # unlabelled views that a config must name, and may add to; none: exactly those above
    target_views: ClassVar[dict[str, tuple[int, ...]]] = {}  # stream -> numbers of the views that only serve as targets, without gradient
    projector_path: ClassVar[str | None] = None  # of the projector, where stage two may keep its first layer
    one_size: ClassVar[bool] = False  # whether all views pass the network together
    teacher_norms: ClassVar[tuple[str, ...]] = ("bn", "shuffle_bn", "sync_bn", "eman")  # those that the method has a use for
    recipe: ClassVar[Recipe]
    transformer_recipe: ClassVar[Recipe | None] = None  # where the paper has another one for them
    # Of a variant of another method: its own values, where those in the signature differ.
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Of stage one: dotted names of settings that usually have a part in it when its embeddings collapse, and what is wrong with them.
    collapse_causes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # What is optimised and averaged; in stage one a sequence of backbone, head and perhaps prototypes. A predictor stands beside it.
    student: nn.Module
    paces: Mapping[str, Pace] = MappingProxyType({})  # names of parts whose learning rate does not follow the run's
    norm: str = "bn"  # what normalises the student: bn | shuffle_bn | sync_bn; set by `from_settings`
    progress: Progress = Progress(0, 1)  # of the run, before the step at hand; set by the loop

    @classmethod
    def from_settings(cls, backbone: "Backbone", facts: Facts, seed: int, settings: Mapping[str, Any]) -> "Method":
        """The method of a resolved config's block `{name: NAME, KEY: value}`; its new layers are drawn from `seed`."""
        model = settings_model(cls)(**{key: value for key, value in settings.items() if key != "name"})
        with seeded(seed, cls.__name__):
            method = cls(backbone, facts, seed, **{name: getattr(model, name) for name in type(model).model_fields})
        teacher = getattr(getattr(model, "teacher", None), "norm", "none")
        method.norm = teacher if teacher in ("shuffle_bn", "sync_bn") else facts.norm
        if method.norm == "sync_bn":
            replace_norms(method, SyncBatchNorm)  # the teacher and all heads too
        return method

    def prepare(self, batch: "Batch") -> None:
        """What comes before the first step of a fresh run, given that step's batch: the norm statistics of a teacher."""

    def forward(self, batch: "Batch") -> Loss:
        raise NotImplementedError

    def after_step(self, progress: Progress) -> None:
        """What follows the optimizer's step: the teacher's update, the queue."""

    @classmethod
    def decide(cls, settings: Mapping[str, Any], facts: Facts) -> Decisions:
        """Values for the settings left `auto`, each with its reason. Raises InputError for an impossible explicit value."""
        return decide_teacher(settings["teacher"], facts) if "teacher" in settings else {}


def decide_momentum(momentum: float, steps: int, share: float) -> tuple[float, str]:
    """The paper's momentum, or the largest whose average reaches back over no more than `share` of the run."""
    longest = round(1 - 1 / max(share * steps, 2), 4)
    return (momentum, "the paper's") if momentum <= longest else (longest, f"averages over {share:.0%} of the {steps} steps at most")


def decide_width(paper: int, small: int, image_size: int) -> tuple[int, str]:
    """The paper's width of a head, or a smaller one for small images, whose networks are narrow too."""
    if image_size > SMALL_IMAGE:
        return paper, "the paper's"
    return small, f"for images of up to {SMALL_IMAGE} px; the paper's {paper} belong to a wide network"


def decide_teacher(teacher: Any, facts: Facts, momentum: float = 0.999, share: float = 0.1) -> Decisions:
    """A teacher's momentum and groups, where they are left `auto`. Raises InputError for groups that cannot be."""
    if isinstance(teacher, str):
        return {}
    decisions: Decisions = {}
    if teacher["momentum"] == AUTO:
        decisions["teacher.momentum"] = decide_momentum(momentum, facts.steps, share)
    if teacher["norm"] != "shuffle_bn":
        if teacher["groups"] != AUTO:
            raise InputError(
                f"teacher.groups = {teacher['groups']} would do nothing, since the groups are those of shuffle_bn and teacher.norm is "
                f"{teacher['norm']}: leave it out, or choose norm: shuffle_bn."
            )
        return decisions
    if facts.norm == "sync_bn":
        raise InputError(
            "norm = sync_bn takes statistics over the whole batch, which shuffling does not change, so it does not go with "
            "teacher.norm = shuffle_bn. Choose norm=bn, or another norm for the teacher."
        )
    groups, ranks = teacher["groups"], distributed.announced_ranks()
    if groups == AUTO:
        fitting = (number for number in (8, 4, 2) if facts.batch_size % number == 0 and facts.batch_size // number >= 8)
        groups = next((number for number in fitting if number % ranks == 0), max(2, ranks))
        decisions["teacher.groups"] = groups, "8 as on the paper's 8 devices, fewer where a group would hold under 8 images"
    if groups == 1:
        raise InputError(
            "teacher.groups = 1 with norm shuffle_bn changes nothing: permuting a batch that is normalised as one group leaves its "
            "statistics as they are. Use 2 groups or more, or norm: eman."
        )
    if groups % ranks:
        raise InputError(f"teacher.groups = {groups} cannot be dealt evenly to {ranks} ranks: choose a multiple of {ranks}.")
    if facts.batch_size % groups or facts.batch_size // groups < 2:
        raise InputError(
            f"teacher.norm = shuffle_bn needs a batch of {groups} groups (teacher.groups) of at least 2 images, which batch_size = "
            f"{facts.batch_size} is not: choose a multiple of {groups}, from {2 * groups} on, or norm: eman."
        )
    return decisions


def method_names(stage: str) -> list[str]:
    """The methods of `pretrain` or `finetune`: the files in its folder."""
    package = importlib.import_module(f"modicum.{stage}.methods")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_method(stage: str, name: str) -> type[Method]:
    """The one method class that the file `name` of the stage defines. Raises InputError for an unknown name."""
    if name not in method_names(stage):
        raise InputError(f"{stage}.method: unknown method {name!r}{did_you_mean(str(name), method_names(stage))}")
    module = importlib.import_module(f"modicum.{stage}.methods.{name}")
    (found,) = (
        member
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, Method) and member.__module__ == module.__name__
    )
    return found


def settings_model(method: type[Method]) -> type[BaseModel]:
    """The constructor's keyword arguments as a strict model: type, bounds, default and meaning, as written in the signature."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(method).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        annotation, meaning = _split(parameter.annotation)
        if parameter.default is AUTO:
            annotation = Auto | annotation
        fields[parameter.name] = annotation, Field(method.defaults.get(parameter.name, parameter.default), description=meaning)
    assert set(method.defaults) <= set(fields)
    return create_model(method.__name__, __base__=Settings, **fields)


def spelled_out(stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config's block of a method with every setting in it. Raises InputError for one that is unknown or out of bounds."""
    name = settings["name"]
    given = {key: value for key, value in settings.items() if key != "name"}
    model = settings_model(find_method(stage, name))
    return {"name": name, **validate(model, given, f"{stage}.method {name}", f"{stage}.method.").model_dump()}


def _split(annotation: Any) -> tuple[Any, str]:
    """`Annotated[float, Gt(0), "meaning"]` -> `Annotated[float, Gt(0)]` and the meaning."""
    if get_origin(annotation) is not Annotated:
        return annotation, ""
    kind, *metadata = get_args(annotation)
    meaning = " ".join(entry for entry in metadata if isinstance(entry, str))
    for bound in metadata:
        if isinstance(bound, BaseMetadata):
            kind = Annotated[kind, bound]
    return kind, meaning
