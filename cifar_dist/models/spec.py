"""The table of networks, with all facts about a network in one place. Building a network imports torch."""

import importlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeckResults:
    """The student deck's statements on a network: parameters, settings, and accuracy on CIFAR-10 by split."""

    num_parameters: int
    accuracy: dict[str, float]  # from 0 to 1
    settings: dict[str, Any]  # by setting name in Config


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A network.

    builder: MODULE:CLASS, called with num_classes, batchnorm_momentum and, if the network has a base, finetune.
    version: raised when the same weights mean another function. change: describes the newest version, for messages.
    fixed_image_size: the only allowed size in pixels, or 0. min_image_size: the smallest allowed size in pixels.
    input_range: the range for which its published weights were made, or the recipes' choice.
    channels_last_on_cpu: whether NHWC in memory is faster on a CPU (benchmarks/step.py).
    has_base: whether it has a base that can be frozen, and starts from published weights.
    """

    name: str
    builder: str
    version: int
    change: str = ""
    fixed_image_size: int = 0
    min_image_size: int = 0
    input_range: str = "0..1"
    channels_last_on_cpu: bool = False
    has_base: bool = False
    deck: DeckResults | None = field(default=None, repr=False)

    def load_builder(self) -> Any:
        module, _, name = self.builder.partition(":")
        return getattr(importlib.import_module(module), name)


FAN = ModelSpec(
    name="fan",
    builder="cifar_dist.models.fan:Fan",
    version=1,
    fixed_image_size=32,
    deck=DeckResults(
        num_parameters=87_316_426,
        accuracy={"train": 0.9779, "validation": 0.7804, "test": 0.7600},
        settings={"image_size": 32, "flips": "none", "optimizer": "adam", "global_batch_size": 64, "epochs": 30},
    ),
)
RESNET50V2 = ModelSpec(
    name="resnet50v2",
    builder="cifar_dist.models.resnet50v2:ResNet50V2",
    version=2,  # version 1 had no ReLU behind the head's convolution
    change=", with a ReLU behind the head's convolution",
    min_image_size=96,
    input_range="-1..1",
    channels_last_on_cpu=True,
    has_base=True,
    deck=DeckResults(
        num_parameters=26_159_370,
        accuracy={"train": 0.9559, "validation": 0.8922, "test": 0.8451},
        settings={
            "image_size": 224,
            "flips": "both",
            "finetune": False,
            "optimizer": "adam",
            "global_batch_size": 128,
            "epochs": 3,
        },
    ),
)
MODELS = {spec.name: spec for spec in (FAN, RESNET50V2)}
