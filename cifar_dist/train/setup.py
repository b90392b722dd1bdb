"""What a configuration means for a device and a data set: input, model, ids. Shared by training and evaluation."""

import numpy as np
import torch

from cifar_dist import models
from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.pipeline import ImageSpec


def image_spec(config: Config, device: torch.device) -> ImageSpec:
    """What the configured model wants; channels_last pays on GPUs and, measured, for resnet50v2 on the CPU."""
    chosen = config.loop.memory_format
    if chosen == "auto":
        chosen = "channels_last" if device.type == "cuda" or config.model.model == "resnet50v2" else "contiguous"
    return ImageSpec(config.data.image_size, config.data.input_range, chosen == "channels_last")


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


def random_weights_notice(config: Config) -> str | None:
    """What must be said of a network that the deck starts from ImageNet weights and we from random ones."""
    if config.model.model != "resnet50v2":
        return None
    base = "" if config.model.finetune else "its frozen base is random too, "
    return f"resnet50v2 starts from RANDOM weights, not ImageNet's: {base}so it cannot be held against the deck"


def split_ids(config: Config, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(train ids, validation ids): the configured rows of the train split, whose labels are int64 [n]."""
    return order.train_validation_ids(
        labels, config.data.validation_fraction, config.data.train_images, config.data.split_seed
    )
