"""The network of a run: input, model, start weights, precision and ids that its settings mean."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_dist import models
from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.order import ImageSpec
from cifar_dist.errors import UserError
from cifar_dist.models import keras_weights
from cifar_dist.storage import Folder


def image_spec(config: Config, device: torch.device) -> ImageSpec:
    """What the configured model wants. `auto` takes channels_last on a GPU, in bf16 and for resnet50v2; on a CPU
    benchmarks/step.py compares the layouts, on a GPU nobody has yet."""
    chosen = config.loop.memory_format
    if chosen == "auto":
        pays = device.type == "cuda" or config.model.model == "resnet50v2"
        pays = pays or Precision(config.loop.precision, device).name == "bf16"
        chosen = "channels_last" if pays else "contiguous"
    data = config.data
    return ImageSpec(
        data.image_size, data.input_range, chosen == "channels_last", data.crop_padding > 0, data.cutout_size
    )


def augmentation(config: Config) -> order.Augmentation:
    """What happens to training images."""
    data = config.data
    return order.Augmentation(data.image_size, data.flips, data.crop_padding, data.cutout_size)


def build_model(config: Config, num_classes: int, spec: ImageSpec, device: torch.device) -> torch.nn.Module:
    """The configured network with its initial weights on `device`."""
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
    """What the meta.json of a checkpoint must say for a run to go on from it."""
    return {"model": config.model.model, "num_classes": manifest.num_classes, "manifest_sha256": manifest.sha256}


def load_start_weights(config: Config, model: torch.nn.Module) -> dict[str, Any] | None:
    """Loads the weights that the run starts from into `model`; returns what its run card says of them, None if random.

    Raises UserError for a file that is not there or does not fit.
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
    return {"uri": uri, "sha256": sha256, "is_imagenet": md5 == keras_weights.PUBLISHED_MD5}


def weights_notice(config: Config, weights: dict[str, Any] | None) -> str | None:
    """What must be said of a network that the deck starts from ImageNet weights and the run from others."""
    if config.model.model != "resnet50v2" or (weights and weights["is_imagenet"]):
        return None
    if weights:
        return (
            f"resnet50v2 starts from {weights['uri']}, which is not the published file of ImageNet weights; if it has "
            "a head and does not describe its layers (.weights.h5), nothing says that the head has the deck's ReLU"
        )
    base = "" if config.model.finetune else "its frozen base is random too, "
    return (
        f"resnet50v2 starts from RANDOM weights, not ImageNet's: {base}so it cannot be held against the deck "
        "(jobs/weights.py fetches the weights, --weights names them)"
    )


def split_ids(config: Config, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train ids, validation ids): the configured rows of the train split, whose labels are int64 [n]."""
    return order.train_validation_ids(
        labels, config.data.validation_fraction, config.data.train_images, config.data.split_seed
    )


class Precision:
    """The resolved precision of a run on a device: fp32, bf16 or fp16.

    auto is bf16 on a GPU that has it and fp16 on an older one; on a CPU bf16 where it has instructions for it (AMX,
    AVX-512 BF16), else fp32. Without AMX bf16 may be slower (docs/performance.md). fp16 scales the loss, others do not
    need it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                has = torch.cpu.get_capabilities()
                name = "bf16" if has.get("amx_bf16") or has.get("avx512_bf16") else "fp32"
        self.name, self.device = name, device
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")
