"""Our networks against real Keras: the same weights, the same functions, the same training."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_keras
from torch import nn

from cifar_dist import models
from cifar_dist.data.pipeline import ImagePipeline
from cifar_dist.data.spec import ImageSpec
from cifar_dist.models.keras_weights import load_keras_weights
from cifar_dist.recipes import recipe_config
from cifar_dist.train.optim import make_optimizers, set_step

# Max abs error over the logits' scale.
LOGITS = {"fan": 1e-4, "resnet50v2": 1e-4, "resnet50v2_224": 1e-4}
FP32_BETAS = float(np.float32(0.9)), float(np.float32(0.999))
LOGITS |= {"fan_float64": 1e-9, "resnet50v2_float64": 1e-9, "finetune_float64": 1e-9}


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
    return float((ours.detach() - torch.from_numpy(keras)).abs().max() / np.abs(keras).max())


@pytest.mark.parametrize("name", LOGITS)
def test_logits_in_inference_mode(name: str, reference: Path):
    model, keras = loaded(name, reference)
    model.eval()
    inputs = [key.removeprefix("infer_") for key in keras if key.startswith("infer_")]
    assert inputs
    with torch.inference_mode():
        errors = [relative_error(model(nchw(keras[key])), keras[f"infer_{key}"]) for key in inputs]
        last = model(nchw(keras[inputs[-1]]).contiguous(memory_format=torch.channels_last))
    print(f"parity {name} inference {max(errors):.2e}")
    assert max(errors) <= LOGITS[name]
    assert relative_error(last, keras[f"infer_{inputs[-1]}"]) <= LOGITS[name]


@pytest.mark.parametrize("name", LOGITS)
def test_logits_in_training_mode(name: str, reference: Path):
    model, keras = loaded(name, reference)
    error = relative_error(model.train()(nchw(keras["images"][0])), keras["train"])
    print(f"parity {name} training {error:.2e}")
    assert error <= LOGITS[name]
    inference = model.eval()(nchw(keras["images"][0]))
    assert relative_error(inference, keras["train"]) > 0.01  # the modes do differ


def keras_rounding(step: int) -> float:
    """Keras's bias corrections hold the betas in fp32 also in float64: a first rate 7e-6 too low."""
    correction = [math.sqrt(1 - beta2**step) / (1 - beta1**step) for beta1, beta2 in (FP32_BETAS, (0.9, 0.999))]
    return correction[0] / correction[1]


@pytest.mark.parametrize("name", ["fan_float64", "resnet50v2_float64", "finetune_float64"])
def test_ten_steps_of_the_decks_adam(name: str, reference: Path):
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
    worst = np.abs(np.array(losses) / keras["losses"] - 1).max()
    print(f"parity {name} losses of ten steps {worst:.2e}: {losses[0]:.3f} to {losses[-1]:.3f}")
    assert len(losses) == 10
    assert worst <= 1e-7
    trained = [m for m in model.modules() if isinstance(m, models.KerasBatchNorm) and m.weight.requires_grad]
    # Keras lists a nested base's layers first.
    total = sum(key.startswith("mean_") for key in keras)
    for i, layer in enumerate(trained, total - len(trained)):
        for ours, theirs in ((layer.running_mean, keras[f"mean_{i}"]), (layer.running_var, keras[f"variance_{i}"])):
            assert relative_error(ours, theirs) <= 1e-6
    for key, value in frozen.items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("name", LOGITS)
def test_parameter_counts_are_keras_own(name: str, reference: Path):
    model, keras = loaded(name, reference)
    assert models.count_parameters(model) == tuple(keras["counts"])
    if name in ("fan", "resnet50v2"):  # those of the deck
        assert models.count_parameters(model)[0] == {"fan": 87_316_426, "resnet50v2": 26_159_370}[name]


def test_resizing_is_keras_own(reference: Path):
    keras = np.load(reference / "resizing.npz")
    pipeline = ImagePipeline(ImageSpec(224, "0..255", True), 4, False, True, torch.device("cpu"), 1)
    pipeline.submit(keras["images"])
    ours = pipeline.collect()
    assert (ours - nchw(keras["resized"])).abs().max() <= 1e-3  # of 255


BASE_FILES = ["base.weights.h5", "base.keras", "base_published.h5", "base_unsuffixed.h5"]
WHOLE_FILES = ["resnet50v2.keras", "resnet50v2_legacy.h5", "resnet50v2_flat.weights.h5"]


@pytest.mark.parametrize("file", BASE_FILES + WHOLE_FILES)
def test_every_format_gives_the_same_weights(file: str, reference: Path):
    expected, _ = loaded("resnet50v2", reference)
    model = models.build("resnet50v2", seed=5)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    whole = file in WHOLE_FILES
    assert load_keras_weights(model, reference / file) == (len(start) if whole else 270)
    for key, value in model.state_dict().items():
        wanted = expected.state_dict()[key] if whole or key.startswith("base.") else start[key]
        assert torch.equal(value, wanted), key


def test_fan_from_a_keras_file(reference: Path):
    expected, _ = loaded("fan", reference)
    model = models.build("fan", seed=5)
    assert load_keras_weights(model, reference / "fan.keras") == len(model.state_dict())
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_published_imagenet_weights(image_file: list[object], tmp_path: Path):
    """`make imagenet-check` names the file; the base's features are Keras's on random and real images."""
    if not (path := os.environ.get("IMAGENET_WEIGHTS")):
        pytest.skip("IMAGENET_WEIGHTS names no file; `make imagenet-check` downloads it")
    run_keras(tmp_path, "--imagenet", path, *image_file)
    keras = np.load(tmp_path / "imagenet.npz")
    model = models.build("resnet50v2").eval()
    assert load_keras_weights(model, path) == 270
    with torch.inference_mode():
        features = model.base(nchw(keras["images"])).permute(0, 2, 3, 1)
    error = relative_error(features, keras["features"])
    print(f"parity imagenet features {error:.2e}")
    assert error <= LOGITS["resnet50v2"]
