"""Both sides' networks as one list of lines, so that they can be held against each other layer by layer.

A line is a layer with its settings and the numbers of the lines that feed it: `12 add <- 7, 11`. Lines come in the
order in which a walk back from the output meets them, whatever the order in the source.
"""

import operator
from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import nn

from cifar_dist.config import Config
from cifar_dist.models.layers import Flatten, GlobalAveragePooling, KerasBatchNorm

Graph = dict[str, tuple[str, list[str]]]  # name -> (layer and settings, the names that feed it)


def lines_of(graph: Graph, output: str) -> list[str]:
    numbers: dict[str, int] = {"input": 0}
    lines: list[str] = []

    def visit(name: str) -> None:
        if name in numbers:
            return
        label, inputs = graph[name]
        for feeding in inputs:
            visit(feeding)
        numbers[name] = len(lines) + 1
        lines.append(f"{numbers[name]} {label} <- {', '.join(str(numbers[i]) for i in inputs)}")

    visit(output)
    return lines


def chain(graph: Graph, name: str, inputs: list[str], labels: list[str]) -> None:
    """Adds `labels` one after another; the last one has the name."""
    for i, label in enumerate(labels):
        own = name if i == len(labels) - 1 else f"{name}/{i}"
        graph[own] = (label, inputs)
        inputs = [own]


def keras_lines(layers: list[dict[str, Any]]) -> list[str]:
    """The lines of a network that keras_reference.py described."""
    graph: Graph = {}
    for layer in layers:
        chain(graph, layer["name"], layer["inputs"], keras_labels(layer["class"], layer["config"]))
    return lines_of(graph, layers[-1]["name"])


# Arguments whose default is what our layers do; another value is an error, as is an argument that nobody knows.
INITIALIZERS = {"kernel": "GlorotUniform", "bias": "Zeros", "gamma": "Ones", "beta": "Zeros"}
INITIALIZERS |= {"moving_mean": "Zeros", "moving_variance": "Ones"}
DEFAULTS: dict[str, Any] = {
    **{f"{name}_{kind}": None for name in INITIALIZERS for kind in ("regularizer", "constraint")},
    **{"activity_regularizer": None, "data_format": "channels_last", "dilation_rate": [1, 1], "groups": 1},
    **{"center": True, "scale": True, "synchronized": False, "renorm": False, "renorm_clipping": None},
    **{"renorm_momentum": 0.99, "seed": None, "noise_shape": None, "quantization_config": None, "keepdims": False},
    **{"crop_to_aspect_ratio": False, "pad_to_aspect_ratio": False, "fill_mode": "constant", "fill_value": 0.0},
}
READ = {
    *("trainable", "filters", "kernel_size", "strides", "padding", "activation", "use_bias", "axis", "momentum"),
    *("epsilon", "rate", "units", "height", "width", "interpolation", "antialias", "mode", "pool_size"),
}


def check_arguments(c: dict[str, Any]) -> None:
    """Every argument that keras_labels does not read has the value that it must have."""
    for name, value in c.items():
        if name.endswith("_initializer"):
            assert value["class_name"] == INITIALIZERS[name.removesuffix("_initializer")], (name, value)
        elif name not in READ:
            assert value == DEFAULTS[name], (name, value)


def square(pair: list[int]) -> int:
    assert pair[0] == pair[1]
    return pair[0]


def keras_labels(kind: str, c: dict[str, Any]) -> list[str]:
    check_arguments(c)
    frozen = "" if c["trainable"] else " frozen"
    if kind in ("Conv2D", "Dense"):
        bias = "bias" if c["use_bias"] else "no bias"
        label = f"dense {c.get('units')} {bias}{frozen}"
        if kind == "Conv2D":
            height, width = c["kernel_size"]
            label = f"conv {c['filters']} {height}x{width} stride {square(c['strides'])} {c['padding']} {bias}{frozen}"
        return [label] + ([c["activation"]] if c["activation"] != "linear" else [])
    if kind == "BatchNormalization":
        assert c["axis"] in (-1, 3)
        return [f"batchnorm epsilon {c['epsilon']:g} momentum {c['momentum']:g}{frozen}"]
    if kind == "ZeroPadding2D":
        return [f"pad {square([square(side) for side in c['padding']])}"]
    if kind == "MaxPooling2D":
        size, stride = square(c["pool_size"]), square(c["strides"])
        assert c["padding"] == "valid"
        return [f"subsample {stride}" if size == 1 else f"max-pool {size} stride {stride}"]
    if kind == "Resizing":
        size = square([c["height"], c["width"]])
        return [f"resize {size} {c['interpolation']}{' antialias' if c['antialias'] else ''}"]
    others = {"Activation": "activation", "Dropout": "rate", "RandomFlip": "mode"}
    plain = {"Add": "add", "Flatten": "flatten", "GlobalAveragePooling2D": "global average"}
    return [plain[kind]] if kind in plain else [f"{kind.lower()} {c[others[kind]]}".removeprefix("activation ")]


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = isinstance(module, KerasBatchNorm | nn.Dropout | Flatten | GlobalAveragePooling)
        return own or super().is_leaf_module(module, name)


def our_lines(model: nn.Module, config: Config) -> list[str]:
    """The lines of our network, behind those of what the recipe does to its images; the softmax is the last one."""
    graph: Graph = {}
    before = "input"
    data = config.data
    flips = {"none": [], "horizontal": ["horizontal"], "both": ["horizontal_and_vertical"]}[data.flips]
    images = [f"resize {data.image_size} bilinear"] * (data.image_size != 32) + [f"randomflip {mode}" for mode in flips]
    if images:
        chain(graph, "images", [before], images)
        before = "images"
    names: dict[str, str] = {}  # of what does nothing -> what feeds it
    output = ""
    for node in Tracer().trace(model).nodes:
        inputs = [names.get(arg.name, arg.name) for arg in node.args if isinstance(arg, torch.fx.Node)]
        if node.op == "placeholder":
            names[node.name] = before
        elif node.op == "output":
            (output,) = inputs
        else:
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            labels = module_labels(module) if module else function_labels(node)
            if labels:
                chain(graph, node.name, inputs, labels)
            else:
                (names[node.name],) = inputs
    chain(graph, "loss", [output], ["softmax"])
    return lines_of(graph, "loss")


def module_labels(module: Any) -> list[str]:
    frozen = "" if all(p.requires_grad for p in module.parameters()) else " frozen"
    if isinstance(module, nn.Conv2d):
        (height, width), (stride, _), (pad, _) = module.kernel_size, module.stride, module.padding
        assert (module.dilation, module.groups) == ((1, 1), 1)
        bias = "no bias" if module.bias is None else "bias"
        label = f"conv {module.out_channels} {height}x{width} stride {stride} valid {bias}{frozen}"
        return [f"pad {pad}", label] if pad else [label]
    if isinstance(module, nn.Linear):
        return [f"dense {module.out_features} {'no bias' if module.bias is None else 'bias'}{frozen}"]
    if isinstance(module, KerasBatchNorm):
        return [f"batchnorm epsilon {module.epsilon:g} momentum {module.momentum:g}{frozen}"]
    if isinstance(module, nn.Dropout):
        return [f"dropout {module.p:g}"]
    return [{nn.ReLU: "relu", Flatten: "flatten", GlobalAveragePooling: "global average"}[type(module)]]


def function_labels(node: torch.fx.Node) -> list[str]:
    if node.target is F.pad:
        (pad,) = set(node.args[1])  # type: ignore[arg-type]
        return [f"pad {pad}"]
    if node.target is operator.getitem:
        *whole, height, width = node.args[1]  # type: ignore[misc]
        assert whole == [slice(None)] * 2
        assert height == width
        return [f"subsample {height.step}"] if height.step > 1 else []
    if node.target is F.max_pool2d:
        return [f"max-pool {node.args[1]} stride {node.kwargs['stride']}"]
    return [{F.relu: "relu", operator.add: "add"}[node.target]]  # type: ignore[index]
