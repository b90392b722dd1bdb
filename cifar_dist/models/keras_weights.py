"""Loads weights that Keras saved into our networks. Checks shapes, and that each tensor is used exactly once."""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from cifar_dist.errors import UserError
from cifar_dist.models.hdf5 import check_file, check_heaps
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.models.resnet50v2 import STACKS, ResNet50V2, ResNet50V2Base

KERAS_NAME = re.compile(r"conv1_conv|post_bn|conv\d_block\d_(\d|preact)_(conv|bn)")  # of a layer in the base
STATE = ("optimizer", "seed_generator")  # groups that hold no weights
MAX_CONFIG_BYTES = 64 << 20
# Limits the HDF5 file in a .keras archive, which is unpacked in memory. Optimizers add a few values for each weight.
MAX_BYTES_PER_WEIGHT = 64
FAULTS = (
    *(OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error),
)
VARIABLES = {
    "convolution": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
    "batch normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}


@dataclass(frozen=True)
class Layer:
    """A layer of the file: its path in the file, its name, and its variables in Keras's layout, by Keras's names."""

    path: str
    name: str
    variables: dict[str, h5py.Dataset]

    @property
    def kind(self) -> str:
        """The kind of layer, from its variables' dimensions, or from its name if it lacks a kernel."""
        dimensions = max(value.ndim for value in self.variables.values())
        if dimensions == 1 and (clue := re.match("conv|dense", self.name)):
            return {"conv": "convolution", "dense": "dense"}[clue[0]]
        return {4: "convolution", 1: "batch normalization"}.get(dimensions, "dense")


def load_keras_weights(model: nn.Module, path: str | Path) -> int:
    """Copies the weights of a Keras file into `model`; returns the number of tensors read.

    The file is an HDF5 file with a group per layer (the published ResNet50V2 weights, or a whole model), Keras 3's
    `.weights.h5` or `.keras`. It holds the whole network or, for resnet50v2, only the base; the head is then left
    unchanged. Layers with numbered names (`conv2d_3`) are assigned in the file's order. If a tensor is missing, left
    over, not finite or of a wrong shape, raises UserError with the layer's name and leaves `model` unchanged.
    """
    with ExitStack() as files:
        layers, described = read_file(path, files, num_bytes=most_bytes(model))
        new = values_of(layers, places_of(model, layers, described, path), path)
    with torch.no_grad():
        for target, value in new:
            target.copy_(value)
    return len(new)


def most_bytes(model: nn.Module) -> int:
    """Returns the maximum size in bytes of the HDF5 file in a .keras archive of this model's weights."""
    return sum(tensor.numel() for tensor in model.state_dict().values()) * MAX_BYTES_PER_WEIGHT + (16 << 20)


def places_of(model: nn.Module, layers: list[Layer], described: list, path: str | Path) -> dict[str, Any]:
    """Returns the model's layers that the file must fill: all layers, or only the base's if the file has no head."""
    if not isinstance(model, ResNet50V2):
        return keras_layers(model)
    check_head(described, path)
    has_head = any(layer.kind == "dense" for layer in layers)
    return keras_layers(model) if has_head else base_layers(model.base)


def values_of(layers: list[Layer], slots: dict[str, Any], path: str | Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (tensor of the model, its new value) for each tensor. Reads a value only after checking its shape."""
    found = assign(layers, slots, path)
    new: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, module in slots.items():
        if name not in found:
            raise UserError(f"{path} lacks the layer {name} ({kind_of(module)})")
        layer = found[name]
        wanted = tensors_of(module)
        if missing := wanted.keys() - layer.variables.keys():
            raise UserError(f"{path}: layer {layer.path} lacks {', '.join(sorted(missing))}")
        if extra := layer.variables.keys() - wanted.keys():
            raise UserError(f"{path}: layer {layer.path} has {', '.join(sorted(extra))}, for which {name} has no place")
        for variable, target in wanted.items():
            dataset = layer.variables[variable]
            order = {4: (3, 2, 0, 1), 2: (1, 0)}.get(dataset.ndim, range(dataset.ndim))  # [h, w, in, out], [in, out]
            shape = [dataset.shape[i] for i in order]
            if shape != list(target.shape):
                raise UserError(
                    f"{path}: {variable} of layer {layer.path} has the shape {list(dataset.shape)}, "
                    f"which as {shape} does not fit {list(target.shape)} of {name}"
                )
            value = read_values(dataset, path).permute(*order)
            if not value.isfinite().all():
                raise UserError(f"{path}: {variable} of layer {layer.path} holds values that are not finite")
            new.append((target, value))
    return new


def read_values(dataset: h5py.Dataset, path: str | Path) -> torch.Tensor:
    try:
        return torch.from_numpy(np.asarray(dataset[()], np.float32))
    except FAULTS as error:
        raise UserError(f"{path}: {dataset.name} cannot be read: {error}") from error


def base_layers(base: ResNet50V2Base) -> dict[str, Any]:
    """Returns Keras's layer name -> module, in the order in which Keras lists and saves the layers."""
    layers: dict[str, Any] = {"conv1_conv": base.conv1}
    blocks = iter(base.blocks)
    for stack, (_, num_blocks, _) in enumerate(STACKS, 2):
        for number, block in zip(range(1, num_blocks + 1), blocks, strict=False):
            name = f"conv{stack}_block{number}"
            parts = {"preact_bn": block.preact_bn, "1_conv": block.conv1, "1_bn": block.bn1}
            parts |= {"2_conv": block.conv2, "2_bn": block.bn2, "0_conv": block.shortcut, "3_conv": block.conv3}
            layers |= {f"{name}_{part}": module for part, module in parts.items() if module is not None}
    return layers | {"post_bn": base.post_bn}


def keras_layers(model: nn.Module) -> dict[str, Any]:
    """Returns name -> module for each layer with weights, in Keras's order. Uses our names where Keras has none."""
    with_weights: dict[str, Any] = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | KerasBatchNorm)
    }
    if not isinstance(model, ResNet50V2):
        return with_weights
    return base_layers(model.base) | {n: m for n, m in with_weights.items() if not n.startswith("base.")}


def kind_of(module: Any) -> str:
    return {nn.Conv2d: "convolution", nn.Linear: "dense", KerasBatchNorm: "batch normalization"}[type(module)]


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    own = (module.weight, module.bias)
    own += (module.running_mean, module.running_var) if isinstance(module, KerasBatchNorm) else ()
    return {name: t for name, t in zip(VARIABLES[kind_of(module)], own, strict=True) if t is not None}


def assign(layers: list[Layer], slots: dict[str, Any], path: str | Path) -> dict[str, Layer]:
    """Returns slot -> layer of the file. Matches Keras's own names; other layers by kind, in the file's order."""
    found: dict[str, Layer] = {}
    has_names = any(layer.name in slots for layer in layers)
    # If the file names the base's layers, its numbered layers belong to the head.
    numbered = [n for n in slots if not (has_names and KERAS_NAME.fullmatch(n))]
    for layer in layers:
        free = (n for n in numbered if n not in found and kind_of(slots[n]) == layer.kind)
        name = layer.name if layer.name in slots else next(free, "")
        if not name or name in found:
            raise UserError(f"{path}: layer {layer.path} ({layer.kind}) is left over: this network has no place for it")
        found[name] = layer
    return found


def check_head(described: list[tuple[str, dict[str, Any]]], path: str | Path) -> None:
    """Raises UserError if the file describes the network's layers and the head's convolution has no ReLU."""
    convolutions = [
        i
        for i, (kind, settings) in enumerate(described)
        if kind == "Conv2D" and not KERAS_NAME.fullmatch(str(settings.get("name")))
    ]
    if not convolutions or all(kind != "Dense" for kind, _ in described):
        return  # only the base, or no description
    (_, convolution), (kind, following) = [*described, ("", {})][convolutions[-1] :][:2]
    if "relu" not in (activation_of(convolution), activation_of(following), kind.lower()):
        raise UserError(
            f"{path}: the head's convolution {convolution.get('name')} has no ReLU behind it, as the deck's and this "
            "network's has; the file's weights belong to another network"
        )


def activation_of(settings: dict[str, Any]) -> str:
    """Returns 'relu', 'linear', ... Keras stores a layer that serves as activation as a description of the layer."""
    activation = settings.get("activation")
    return str(activation.get("class_name") if isinstance(activation, dict) else activation).lower()


def described_layers(model: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (class, settings) of the layers in Keras's description of a model. Expands nested models in place."""
    settings = model.get("config", {})
    for layer in settings if isinstance(settings, list) else settings.get("layers", []):
        if isinstance(layer["config"], list) or "layers" in layer["config"]:
            yield from described_layers(layer)
        else:
            yield layer["class_name"], dict(layer["config"])


def read_file(
    path: str | Path, files: ExitStack, num_bytes: int
) -> tuple[list[Layer], list[tuple[str, dict[str, Any]]]]:
    """Returns (layers with weights, (class, settings) of all layers).

    Layers are in the model's order as far as the file tells it. The second list is empty if the file has no
    description. The file stays open in `files`. Raises UserError for other kinds of files, and for a file that has more
    than `num_bytes` when unpacked."""
    config: Any = "{}"
    try:
        source: Path | str | io.BytesIO = path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                source = io.BytesIO(unpacked(archive, "model.weights.h5", num_bytes))
                if "config.json" in archive.namelist():
                    config = unpacked(archive, "config.json", MAX_CONFIG_BYTES)
        file = files.enter_context(h5py.File(source, "r"))
        check_heaps(source, path)
        check_file(file, path)
        layers = list(layers_of(file.get("model_weights", file)))
        config = json.loads(file.attrs.get("model_config", config))
        described = list(described_layers(config))
    except FileNotFoundError:
        raise UserError(f"there is no weights file {path}") from None
    except FAULTS as error:
        raise UserError(f"{path} is not a Keras weights file (.h5, .weights.h5 or .keras): {error}") from error
    if not layers:
        raise UserError(f"{path} holds no layers: is it a Keras weights file (.h5, .weights.h5 or .keras)?")
    return layers, described


def unpacked(archive: zipfile.ZipFile, name: str, num_bytes: int) -> bytes:
    """Reads a file of the archive. Raises ValueError if it has over `num_bytes`, whatever size the archive states."""
    with archive.open(name) as file:
        content = file.read(num_bytes + 1)
    if len(content) > num_bytes:
        raise ValueError(f"its {name} is larger than {num_bytes >> 20} MiB, more than this network's weights need")
    return content


def layers_of(group: h5py.Group) -> Iterator[Layer]:
    """Yields the layers below a group. Nested models come first, as in Keras if a model is built on another."""
    values = {name.split(":")[0]: item for name, item in group.items() if isinstance(item, h5py.Dataset)}
    place = group.name.removesuffix("/vars")
    if values:
        layer = Layer(place.strip("/"), place.rsplit("/", 1)[-1], values)
        if place != group.name:  # Keras 3 numbers the variables
            numbers = {str(i): name for i, name in enumerate(VARIABLES[layer.kind])}
            values = {numbers.get(name, name): value for name, value in values.items()}
        yield Layer(layer.path, layer.name, values)

    def rank(name: str) -> tuple:
        item = group[name]
        is_model = isinstance(item, h5py.Group) and "layers" in item
        # sorts numbers by value: conv2d, conv2d_1, conv2d_2, ..., conv2d_10
        return not is_model, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    own = set(group.keys())  # not `in group`, which also accepts paths
    names = [n.decode() if isinstance(n, bytes) else str(n) for n in group.attrs.get("layer_names", [])]
    for name in [n for n in names if n in own] + sorted(own - set(names), key=rank):
        if isinstance(group[name], h5py.Group) and not name.startswith(STATE):
            yield from layers_of(group[name])
