"""How far our networks are from what keras_reference.py stored of Keras's: the errors, for tests and benchmarks."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist import models
from cifar_dist.models.keras_weights import load_keras_weights
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.recipes import recipe_config
from cifar_dist.train.optim import make_optimizers, set_step

FP32 = ("fan", "resnet50v2", "resnet50v2_224")
FLOAT64 = ("fan_float64", "resnet50v2_float64", "finetune_float64")
FP32_BETAS = float(np.float32(0.9)), float(np.float32(0.999))
BASE_FILES = ("base.weights.h5", "base.keras", "base_published.h5", "base_unsuffixed.h5")
WHOLE_FILES = ("resnet50v2.keras", "resnet50v2_legacy.h5", "resnet50v2_flat.weights.h5")


def loaded(name: str, reference: Path) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """Our network with Keras's weights, dropout off, and what Keras computed."""
    network = "fan" if name.startswith("fan") else "resnet50v2"
    model = models.build(network, finetune=name.startswith("finetune"))
    load_keras_weights(model, reference / f"{network}.weights.h5")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.to(torch.float64 if name.endswith("float64") else torch.float32)
    return model, dict(np.load(reference / f"{name}.npz"))


def nchw(images: np.ndarray) -> torch.Tensor:
    images = images.astype(np.float64 if images.dtype == np.float64 else np.float32)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def relative_error(ours: torch.Tensor, keras: np.ndarray) -> float:
    """The largest absolute error over the largest value."""
    return float((ours.detach() - torch.from_numpy(keras)).abs().max() / np.abs(keras).max())


def inference_error(name: str, reference: Path) -> float:
    """The largest error of the logits, over all kinds of images and both memory formats."""
    model, keras = loaded(name, reference)
    inputs = [key.removeprefix("infer_") for key in keras if key.startswith("infer_")]
    assert inputs
    errors = []
    with torch.inference_mode():
        for key in inputs:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                logits = model.eval()(nchw(keras[key]).contiguous(memory_format=memory_format))
                errors.append(relative_error(logits, keras[f"infer_{key}"]))
    return max(errors)


def training_error(name: str, reference: Path) -> float:
    """The error of the logits in training mode, which must differ from those of inference mode."""
    model, keras = loaded(name, reference)
    error = relative_error(model.train()(nchw(keras["images"][0])), keras["train"])
    assert relative_error(model.eval()(nchw(keras["images"][0])), keras["train"]) > 0.01
    return error


def keras_rounding(step: int) -> float:
    """Keras's bias corrections hold the betas in fp32 also in float64: a first rate 7e-6 too low."""
    correction = [math.sqrt(1 - beta2**step) / (1 - beta1**step) for beta1, beta2 in (FP32_BETAS, (0.9, 0.999))]
    return correction[0] / correction[1]


def adam_errors(name: str, reference: Path) -> tuple[float, float]:
    """(relative error of the losses, error of the moving statistics) after ten steps of the deck's Adam.

    What is frozen must not have changed.
    """
    model, keras = loaded(name, reference)
    config = recipe_config("deck_fan" if name.startswith("fan") else "deck_resnet50v2").optim
    frozen = {} if "finetune" in name else {k: v.clone() for k, v in model.state_dict().items() if "base." in k}
    optimizers, losses = make_optimizers(model, config), []
    model.train()
    for step, (images, labels) in enumerate(zip(keras["images"], keras["labels"], strict=True)):
        set_step(optimizers, config, step, 10)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= keras_rounding(step + 1)
        loss = F.cross_entropy(model(nchw(images)), torch.from_numpy(labels))
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert len(losses) == len(keras["losses"]) == 10
    trained = [m for m in model.modules() if isinstance(m, KerasBatchNorm) and m.weight.requires_grad]
    # Keras lists a nested base's layers first.
    total = sum(key.startswith("mean_") for key in keras)
    statistics = []
    for i, layer in enumerate(trained, total - len(trained)):
        statistics.append(relative_error(layer.running_mean, keras[f"mean_{i}"]))
        statistics.append(relative_error(layer.running_var, keras[f"variance_{i}"]))
    for key, value in frozen.items():
        assert torch.equal(model.state_dict()[key], value), key
    return float(np.abs(np.array(losses) / keras["losses"] - 1).max()), max(statistics)


def check_format(file: str, reference: Path) -> None:
    """The file gives the very weights that the network has from Keras's own format."""
    network = file.partition(".")[0] if file.startswith("fan") else "resnet50v2"
    expected, model = models.build(network), models.build(network, seed=5)
    load_keras_weights(expected, reference / f"{network}.weights.h5")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    whole = file not in BASE_FILES
    assert load_keras_weights(model, reference / file) == (len(start) if whole else 270)
    for key, value in model.state_dict().items():
        wanted = expected.state_dict()[key] if whole or key.startswith("base.") else start[key]
        assert torch.equal(value, wanted), key
