"""Builds a run's network from its settings: input, model, start weights and precision."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from cifar_dist import models
from cifar_dist.config import Config
from cifar_dist.cpus import instruction_sets
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.order import ImageSpec
from cifar_dist.errors import UserError
from cifar_dist.models import keras_weights
from cifar_dist.models.published import PUBLISHED_MD5
from cifar_dist.models.spec import MODELS
from cifar_dist.storage import Folder


def image_spec(config: Config, device: torch.device) -> ImageSpec:
    """Returns the input specification of the configured model.

    `auto` means channels_last on a GPU, in bf16 and for resnet50v2, else contiguous. benchmarks/step.py compares both
    layouts on a CPU; on a GPU nobody has compared them yet."""
    chosen = config.loop.memory_format
    if chosen == "auto":
        pays = device.type == "cuda" or MODELS[config.model.model].channels_last_on_cpu
        pays = pays or Precision(config.loop.precision, device).name == "bf16"
        chosen = "channels_last" if pays else "contiguous"
    data = config.data
    return ImageSpec(
        image_size=data.image_size,
        resize=data.resize,
        antialias=data.antialias,
        input_range=data.input_range,
        channels_last=chosen == "channels_last",
        flips=data.flips,
        crop_padding=data.crop_padding,
        cutout_size=data.cutout_size,
    )


def build_model(config: Config, num_classes: int, spec: ImageSpec, device: torch.device) -> torch.nn.Module:
    """Returns the configured network with its initial weights, on `device`."""
    model = models.build(
        config.model.model,
        num_classes,
        finetune=config.model.finetune,
        batchnorm_momentum=config.model.batchnorm_momentum,
        seed=config.loop.seed,
    )
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=memory_format)


def expected_of(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Returns the meta.json fields that a checkpoint must have for a run to resume from it."""
    return {"model": config.model.model, "num_classes": manifest.num_classes, "manifest_sha256": manifest.sha256}


def load_start_weights(config: Config, model: torch.nn.Module) -> dict[str, Any] | None:
    """Loads the run's start weights into `model`. Returns the run card's entry for them, or None if they are random.

    Raises UserError if the file does not exist or does not fit.
    """
    uri = config.model.weights
    if not uri:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / uri.partition("?")[0].rsplit("/", 1)[-1]
        try:
            sha256 = Folder(uri).download("", path)
        except FileNotFoundError:
            raise UserError(f"--weights: there is no file {uri}; jobs/weights.py fetches the published one") from None
        with open(path, "rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        try:
            keras_weights.load_keras_weights(model, path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), uri)) from error
    return {"uri": uri, "sha256": sha256, "is_imagenet": md5 == PUBLISHED_MD5}


def weights_notice(config: Config, weights: dict[str, Any] | None) -> str | None:
    """Returns a warning if the deck starts the network from ImageNet weights and the run does not, else None."""
    name = config.model.model
    if not MODELS[name].has_base or (weights and weights["is_imagenet"]):
        return None
    if weights:
        return (
            f"{name} starts from {weights['uri']}, which is not the published file of ImageNet weights; if it has "
            "a head and does not describe its layers (.weights.h5), nothing says that the head has the deck's ReLU"
        )
    base = "" if config.model.finetune else "its frozen base is random too, "
    return (
        f"{name} starts from RANDOM weights, not ImageNet's: {base}so it cannot be held against the deck "
        "(jobs/weights.py fetches the weights, --weights names them)"
    )


def eval_batch(device: torch.device, image_size: int) -> int:
    """Returns the images of a batch of validation and evaluation. A GPU wants more than a CPU, of small images.

    256 images of 224 px take ResNet50V2 some 4 GiB in fp32. The number does not depend on the GPU's memory: shards on
    different GPUs must have the same batches.
    """
    return max(32, min(1000, 256 * 224**2 // image_size**2)) if device.type == "cuda" else 100


def use_exact_fp32() -> None:
    """Makes fp32 fp32 on a GPU: by default cuDNN's convolutions round their input to TF32, with 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


class Precision:
    """The resolved precision of a run on a device: fp32, bf16 or fp16.

    On a GPU, auto means bf16 if the hardware supports it, else fp16. On a CPU, auto means bf16 if the CPU has
    instructions for it (AMX, AVX-512 BF16), else fp32. Without AMX, bf16 may be slower than fp32
    (docs/performance.md). Only fp16 needs loss scaling.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                name = "bf16" if instruction_sets() & {"amx_bf16", "avx512_bf16"} else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")
