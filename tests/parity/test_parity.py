"""Our networks against the deck's code in real Keras: the same layers, the same functions, the same training."""

import ast
import hashlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import comparison
import h5py
import numpy as np
import pytest
import torch
from comparison import BASE_FILES, FLOAT64, FP32, WHOLE_FILES, loaded, nchw, relative_error
from keras_run import ROOT, run_keras_or_skip
from structure import keras_lines, our_lines

from cifar_dist import models
from cifar_dist.data.order import Augment, ImageSpec, flips, no_augment
from cifar_dist.data.pipeline import ImagePipeline
from cifar_dist.deck import DECK
from cifar_dist.errors import UserError
from cifar_dist.models.keras_weights import load_keras_weights
from cifar_dist.recipes import recipe_config

DECK_TEXT = ROOT.parent / "shared/seed/deck.txt"
DECK_SHA256 = "bb7602f6173a47dd3f6629f44aede7f275ed7da5eb62ab61f91f1c51521377e3"  # of stated_layers(), in order
# Max abs error over the logits' scale; benchmarks/results/parity.json has the spread over seeds.
INFERENCE = dict.fromkeys(FP32, 1e-5) | dict.fromkeys(FLOAT64, 1e-12)
TRAINING = dict.fromkeys(FP32, 1e-3) | dict.fromkeys(FLOAT64, 1e-10)


def sequential_layers(code: str) -> list[str]:
    """The layers of the code's Sequential, each as Python writes it."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (stack,) = [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "Sequential"]
    (layers,) = stack.args
    assert isinstance(layers, ast.List)
    return [ast.unparse(layer) for layer in layers.elts]


def stated_layers() -> dict[int, list[str]]:
    """Of the two networks in the deck's text, by their number."""
    blocks = re.findall(r"```\n(.*?)```", DECK_TEXT.read_text(), re.DOTALL)
    return {len(layers): layers for block in blocks if "Sequential" in block and (layers := sequential_layers(block))}


def test_the_reference_is_the_decks_code():
    """By its checksum everywhere, by the deck's text where that is at hand."""
    source = Path(__file__).with_name("deck_keras.py").read_text()
    functions = [ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    found = [sequential_layers(code.replace("side, side", "224, 224")) for code in functions]
    ours = {len(layers): layers for layers in found}
    assert hashlib.sha256(repr(sorted(ours.items())).encode()).hexdigest() == DECK_SHA256
    if DECK_TEXT.exists():
        assert ours == stated_layers()


@pytest.mark.parametrize("network", ["fan", "resnet50v2"])
def test_layers_order_arguments_and_activations_are_the_decks(network: str, reference: Path):
    """From what happens to the images to the softmax, every layer and what feeds it."""
    config = recipe_config(f"deck_{network}")
    keras = keras_lines(json.loads((reference / "structure.json").read_text())[network])
    settings = {"finetune": config.model.finetune, "batchnorm_momentum": config.model.batchnorm_momentum}
    ours = our_lines(models.build(network, **settings), config)
    first = next((pair for pair in zip(keras, ours, strict=False) if len(set(pair)) > 1), None)
    assert first is None, f"the deck's {network} has {first[0]!r}, ours has {first[1]!r}"
    assert len(keras) == len(ours)


def test_flips_are_keras_2_s_each_direction_drawn_by_itself(reference: Path):
    """Keras 3 has one draw for both directions: no image is flipped in one of them alone. Ours follows Keras 2."""
    found = json.loads((reference / "structure.json").read_text())
    drawn = flips(0, 0, np.arange(4000)) @ np.array([1, 2])
    ours = dict(zip(("none", "horizontal", "vertical", "both"), np.bincount(drawn, minlength=4), strict=True))
    assert found["flips of Keras 3"].keys() == {"none", "both"}
    for counts, expected in ((found["flips of Keras 3"], 2000), (found["flips of Keras 2"], 1000), (ours, 1000)):
        assert sum(counts.values()) == 4000
        deviation = (4000 * (expected / 4000) * (1 - expected / 4000)) ** 0.5
        assert all(abs(count - expected) < 4 * deviation for count in counts.values()), counts
    assert found["flips of Keras 2"].keys() == ours.keys()


@pytest.mark.parametrize("name", INFERENCE)
def test_logits_in_inference_mode(name: str, reference: Path):
    error = comparison.inference_error(name, reference)
    print(f"parity {name} inference {error:.2e}")
    assert error <= INFERENCE[name]


@pytest.mark.parametrize("name", TRAINING)
def test_logits_in_training_mode(name: str, reference: Path):
    error = comparison.training_error(name, reference)
    print(f"parity {name} training {error:.2e}")
    assert error <= TRAINING[name]


@pytest.mark.parametrize("name", FLOAT64)
def test_ten_steps_of_the_decks_adam(name: str, reference: Path):
    losses, statistics = comparison.adam_errors(name, reference)
    print(f"parity {name} losses of ten steps {losses:.2e}, statistics {statistics:.2e}")
    assert losses <= 1e-7
    assert statistics <= 1e-6


@pytest.mark.parametrize("name", FP32 + FLOAT64)
def test_parameter_counts_are_keras_own(name: str, reference: Path):
    model, keras = loaded(name, reference)
    assert models.count_parameters(model) == tuple(keras["counts"])
    if name in DECK:
        assert models.count_parameters(model)[0] == DECK[name].num_parameters


def pipeline() -> ImagePipeline:
    config = recipe_config("deck_resnet50v2").data
    spec = ImageSpec(image_size=config.image_size, input_range=config.input_range, channels_last=True)
    return ImagePipeline(spec, max_batch_size=8, encoded=False, resize=True, device=torch.device("cpu"), num_threads=1)


def test_from_pixels_to_logits_it_is_the_decks_model(reference: Path):
    """Our decoded pixels through our resize and network, against the deck's whole Sequential."""
    keras = np.load(reference / "pixels.npz")
    model, _ = loaded("resnet50v2_224", reference)
    dali = pipeline()
    dali.submit(keras["pixels"].copy())
    images = dali.collect()
    assert (images - nchw(keras["resized"] / 127.5 - 1)).abs().max() <= 1e-5
    with torch.inference_mode():
        assert relative_error(model.eval()(images), keras["logits"]) <= INFERENCE["resnet50v2_224"]


def test_to_flip_before_the_resize_is_to_flip_after_it(reference: Path):
    """The deck resizes first; to flip 32 px costs less, and gives the same."""
    keras = np.load(reference / "pixels.npz")
    ways = np.array([[x, y] for x in (False, True) for y in (False, True)] * 2)
    dali = pipeline()
    dali.submit(keras["pixels"].copy(), Augment(ways, *no_augment(8, 224)[1:]))
    for image, resized, (x, y) in zip(dali.collect(), keras["resized"], ways, strict=True):
        flipped = resized[:: -1 if y else 1, :: -1 if x else 1] / 127.5 - 1
        assert (image - torch.from_numpy(flipped.copy()).permute(2, 0, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("file", [*BASE_FILES, *WHOLE_FILES, "fan.keras"])
def test_every_format_gives_the_same_weights(file: str, reference: Path):
    comparison.check_format(file, reference)


@pytest.mark.parametrize("file", ["resnet50v2.keras", "resnet50v2_legacy.h5"])
def test_weights_of_a_head_without_its_relu_are_refused(file: str, reference: Path, tmp_path: Path):
    """The same tensors, saved by Keras from a network whose convolution has no activation."""

    def without_relu(text: str | bytes) -> str:
        description = json.loads(text)
        (head,) = [c for c in description["config"]["layers"] if c["class_name"] == "Conv2D"]
        assert head["config"]["activation"] == "relu"
        head["config"]["activation"] = "linear"
        return json.dumps(description)

    other = Path(shutil.copy(reference / file, tmp_path))
    if file.endswith(".keras"):
        with zipfile.ZipFile(reference / file) as archive, zipfile.ZipFile(other, "w") as changed:
            for name in archive.namelist():
                content = archive.read(name)
                changed.writestr(name, without_relu(content) if name == "config.json" else content)
    else:
        with h5py.File(other, "a") as opened:
            opened.attrs["model_config"] = without_relu(opened.attrs["model_config"])
    model = models.build("resnet50v2", seed=5)
    with pytest.raises(UserError, match=r"the head's convolution conv2d\S* has no ReLU behind it"):
        load_keras_weights(model, other)
    assert torch.equal(model.conv.weight, models.build("resnet50v2", seed=5).conv.weight)


def test_the_published_imagenet_weights(image_file: list[object], tmp_path: Path):
    """`make imagenet-check` names the file; the base's features are Keras's on random and real images."""
    if not (path := os.environ.get("IMAGENET_WEIGHTS")):
        pytest.skip("IMAGENET_WEIGHTS names no file; `make imagenet-check` downloads it")
    run_keras_or_skip(tmp_path, "--imagenet", path, *image_file)
    keras = np.load(tmp_path / "imagenet.npz")
    model = models.build("resnet50v2").eval()
    assert load_keras_weights(model, path) == 270
    with torch.inference_mode():
        features = model.base(nchw(keras["images"])).permute(0, 2, 3, 1)
    error = relative_error(features, keras["features"])
    print(f"parity imagenet features {error:.2e}")
    assert error <= INFERENCE["resnet50v2"]
