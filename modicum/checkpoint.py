"""What a run writes to be read again: the state that resume needs, the backbone that passes from stage to stage, the classifier."""

import io
import json
import struct
import textwrap
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from modicum import __version__
from modicum.errors import InputError
from modicum.files import write_atomically
from modicum.networks import Architecture, Backbone, Classifier
from modicum.networks.backbones import classifier_path, kept_layer, num_features
from modicum.settings import DataSettings

WEIGHTS = "model.safetensors"
PROJECTOR = "projector.safetensors"  # beside the backbone's, so that timm reads those as ever
# What torch, safetensors, json and timm raise, by turns, over a file that is damaged or is something else.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SafetensorError, TypeError,
    UnpicklingError, ValueError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Preprocessing:
    """What a network expects of an image: side in pixels, channels, and the normalisation of pixels in 0..1."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, data: DataSettings) -> "Preprocessing":
        """The preprocessing that resolved settings describe."""
        return cls(int(data.image_size), int(data.channels), tuple(map(float, data.mean)), tuple(map(float, data.std)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values in one atomic step."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """The state written by `save_state`, on the CPU. Raises InputError naming the file where it cannot be read."""
    return load_checkpoint(path, f"The state {path} cannot be read", "; delete it to start this stage anew")


def load_checkpoint(path: Path, problem: str, advice: str = "") -> Any:
    """What `torch.save` wrote of tensors and plain values, on the CPU. Raises InputError of `problem`, why, and `advice`."""
    # torch's own reasons are of no help, and it warns of pickles that are not its own, which it then refuses.
    safe = torch.serialization.safe_globals([Namespace])  # plain values, too: many projects save their command line
    reason = "it is damaged, or holds more than tensors and plain values"
    with refusing(problem, advice, reason), safe, warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises InputError."""
    with refusing(f"{path} cannot be read as a safetensors file"):
        return load(path.read_bytes())


@contextmanager
def refusing(problem: str, advice: str = "", reason: str = "") -> Iterator[None]:
    """Makes whatever a damaged or foreign file raises an InputError of `problem`, `reason` or the library's own, and `advice`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except UNREADABLE as error:
        missing = f"there is no {error}" if isinstance(error, KeyError) else ""
        told = (error.strerror if isinstance(error, OSError) else "") or reason or missing or str(error) or "it is damaged"
        raise InputError(f"{problem}: {textwrap.shorten(told, 200, placeholder=' ...').rstrip('.')}{advice}.") from error


def save_backbone(folder: Path, backbone: Backbone, preprocessing: Preprocessing, projector: nn.Sequential | None = None) -> None:
    """Writes `backbone/` in timm's local-directory format, with a README that says how to load it anywhere.

    The first layer of a `projector` of several goes into a file of its own, for a stage two that keeps it.
    """
    _save_network(folder, backbone.architecture, backbone.network.state_dict(), preprocessing, ())
    if projector is not None and len(projector) > 1:
        _save_weights(folder / PROJECTOR, projector[:3].state_dict())


def load_projector(folder: Path) -> nn.Sequential:
    """The first layer of the projector that `save_backbone` wrote beside the backbone. Raises InputError."""
    if not (folder / PROJECTOR).is_file():
        raise InputError(f"{folder} has no {PROJECTOR}, so finetune.projector_layers must be 0: pretrain.method simclr_v2 writes one.")
    state = load_weights(folder / PROJECTOR)
    with refusing(f"{folder / PROJECTOR} cannot be read as a projector"):
        width, num_inputs = state["0.weight"].shape
        layer = kept_layer(num_inputs, width)
        fill(layer, state, folder / PROJECTOR)
        return layer


def save_classifier(folder: Path, classifier: Classifier, preprocessing: Preprocessing, class_names: tuple[str, ...]) -> None:
    """Writes backbone and head as one timm network with `len(class_names)` outputs."""
    head = classifier_layer(classifier.backbone.architecture, len(class_names))
    state = classifier.backbone.network.state_dict() | {f"{head}.{name}": value for name, value in classifier.head.state_dict().items()}
    _save_network(folder, classifier.backbone.architecture, state, preprocessing, class_names)


def load_backbone(folder: Path) -> tuple[Backbone, Preprocessing]:
    """The backbone of a folder written by `save_backbone` or `save_classifier`, in evaluation mode. Raises InputError."""
    with refusing(f"{folder} cannot be read as a backbone"):
        config, state = _read_network(folder)
        architecture = _architecture(config)
        backbone = Backbone(architecture)
        if config["num_classes"]:
            head = classifier_layer(architecture, config["num_classes"])
            state = {name: value for name, value in state.items() if not name.startswith(f"{head}.")}
        fill(backbone.network, state, folder)
        return backbone.eval(), _preprocessing(config)


def load_classifier(folder: Path) -> tuple[Classifier, Preprocessing, tuple[str, ...]]:
    """The classifier of a folder written by `save_classifier`, in evaluation mode, and the names of its classes. Raises InputError."""
    with refusing(f"{folder} cannot be read as a classifier"):
        config, state = _read_network(folder)
        if not config["num_classes"]:
            raise InputError(f"{folder} holds a backbone without a classifier; give a folder such as RUN/finetune/classifier.")
        architecture, class_names = _architecture(config), tuple(config["label_names"])
        if len(class_names) != config["num_classes"]:
            raise ValueError(f"it has {len(class_names)} label_names for num_classes = {config['num_classes']}")
        classifier = Classifier(Backbone(architecture), len(class_names))
        head = f"{classifier_layer(architecture, len(class_names))}."
        weights = {name.removeprefix(head): value for name, value in state.items() if name.startswith(head)}
        fill(classifier.head, {name: value.flatten(1) if value.ndim > 2 else value for name, value in weights.items()}, folder)
        fill(classifier.backbone.network, {name: value for name, value in state.items() if not name.startswith(head)}, folder)
        return classifier.eval(), _preprocessing(config), class_names


def fill(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Loads `state` into `module`, every entry or none. Raises InputError that names what does not fit or is no finite number."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    surplus = [name for name in state if name not in expected]
    unlike = [
        f"{name} {tuple(state[name].shape)} for {tuple(v.shape)}"
        for name, v in expected.items()
        if name in state and state[name].shape != v.shape
    ]
    for reason, names in (("lacks", missing), ("holds unknown", surplus), ("holds other shapes:", unlike)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(
                f"{source} does not fit this network: it {reason} {shown}. Give the architecture, stem and image size it was made with."
            )
    for name, like in expected.items():
        if state[name].is_complex() or not state[name].to(like.dtype).isfinite().all():
            raise InputError(f"{source} is of no use: {name} holds complex values, or values that are not finite.")
    module.load_state_dict(state)


def classifier_layer(architecture: Architecture, num_classes: int) -> str:
    """The path of the final linear layer in timm's network of this architecture, for example `fc`."""
    with torch.device("meta"):
        network = architecture.build(num_classes)
    return classifier_path(network) + (f".{len(network.get_classifier()) - 1}" if architecture.projector else "")


def _save_network(
    folder: Path, architecture: Architecture, state: dict[str, Tensor], preprocessing: Preprocessing, class_names: tuple[str, ...]
) -> None:
    num_classes = len(class_names)
    with torch.device("meta"):
        network = architecture.build(num_classes)
    known = network.pretrained_cfg
    config = {
        "architecture": architecture.name,
        "num_classes": num_classes,
        "num_features": architecture.projector or num_features(network),
        "model_args": {**architecture.arguments, "in_chans": architecture.channels},
        "pretrained_cfg": {
            "input_size": [preprocessing.channels, preprocessing.image_size, preprocessing.image_size],
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "num_classes": num_classes,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
        "modicum": {"version": __version__, "architecture": asdict(architecture)},
        **({"label_names": class_names} if class_names else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "README.md", _readme(architecture, num_classes, preprocessing))
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    shapes = {name: value.shape for name, value in network.state_dict().items()}  # timm has classifiers that are convolutions of 1 x 1
    _save_weights(folder / WEIGHTS, {name: value.view(shapes[name]) for name, value in state.items()})


def _save_weights(path: Path, state: dict[str, Tensor]) -> None:
    write_atomically(path, save({name: value.detach().cpu().contiguous() for name, value in state.items()}, {"format": "pt"}))


def _readme(architecture: Architecture, num_classes: int, preprocessing: Preprocessing) -> str:
    arguments = {"in_chans": architecture.channels, "num_classes": num_classes, **architecture.arguments}
    lines = [
        "import timm",
        *(["import torch"] if architecture.stem or architecture.projector else []),
        "from safetensors.torch import load_file",
        "",
        f"network = timm.create_model({architecture.name!r}, {', '.join(f'{key}={value!r}' for key, value in arguments.items())})",
    ]
    for path, layer in architecture.stem.items():
        built = "Identity()" if layer is None else f"Conv2d({', '.join(f'{key}={value!r}' for key, value in layer.items())})"
        lines.append(f"network.{path.replace('.0', '[0]')} = torch.nn.{built}")
    if width := architecture.projector:
        with torch.device("meta"):
            network = replace(architecture, projector=0).build()
        layers = [f"Linear({num_features(network)}, {width}, bias=False)", f"BatchNorm1d({width})", "ReLU()"]
        layers += [f"Linear({width}, {num_classes})"] if num_classes else []
        lines.append(f"network.{classifier_path(network)} = torch.nn.Sequential({', '.join(f'torch.nn.{layer}' for layer in layers)})")
    lines += [f'network.load_state_dict(load_file("{WEIGHTS}"))', "network.eval()"]
    short = (
        "Layers differ from timm's own (a small stem, or a projector's layer), so `local-dir:` alone does not do here; the lines above do."
        if architecture.stem or architecture.projector
        else 'Or in one line: `timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True)`.'
    )
    what = f"the {num_classes} class scores (names in `config.json`, `label_names`)" if num_classes else "the features"
    side = preprocessing.image_size
    return (
        f"# {architecture.name}, written by Modicum {__version__}\n\n```python\n" + "\n".join(lines) + "\n```\n\n"
        f"`network(images)` gives {what} of images of shape (batch, {preprocessing.channels}, {side}, {side}):\n"
        f"pixels in 0..1, less the mean {list(preprocessing.mean)}, divided by {list(preprocessing.std)}.\n\n{short}\n"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that we or timm wrote. Raises InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no backbone folder: it has no config.json.")
    with refusing(f"{path} cannot be read as a network's description"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it is a {type(config).__name__}, no mapping")
        return config


def _read_network(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} is no backbone folder: it has no {WEIGHTS}.")
    return config, load_weights(folder / WEIGHTS)


def _architecture(config: dict[str, Any]) -> Architecture:
    if "modicum" in config:
        architecture = Architecture(**config["modicum"]["architecture"])
    else:
        arguments = dict(config.get("model_args") or {})
        channels, size, _ = config["pretrained_cfg"]["input_size"]
        architecture = Architecture(config["architecture"], arguments.pop("in_chans", channels), size, arguments)
    if not timm.is_model(architecture.name):  # timm would look for some at other places, such as a hub
        raise ValueError(f"config.json names an unknown architecture {architecture.name!r}")
    return architecture


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    known = config["pretrained_cfg"]
    channels, size, _ = known["input_size"]
    mean, std = (tuple(map(float, known[name])) for name in ("mean", "std"))
    if not len(mean) == len(std) == channels:
        raise ValueError(f"config.json gives {len(mean)} means and {len(std)} deviations for {channels} channels")
    return Preprocessing(int(size), int(channels), mean, std)
