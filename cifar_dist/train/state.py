"""The state and settings that a rank trains with."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.data.batch import Batch
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision
from cifar_dist.train.communication import Communication
from cifar_dist.train.optim import Average

START = Cursor(0, 0)


def images_of(batch: Batch) -> torch.Tensor:
    """The input of a network without a frozen base."""
    return batch.images


@dataclass(kw_only=True)
class TrainState:
    """The state and settings that a rank trains with.

    trainable: the part of `model` that takes gradients, compiled and wrapped in DistributedDataParallel.
    input_of: computes the input of `trainable` from a batch.
    totals: float64 [3], the loss sum, correct images and seen images of this rank in this epoch.
    """

    config: Config
    model: nn.Module
    trainable: nn.Module
    optimizers: list[torch.optim.Optimizer]
    precision: Precision
    average: Average | None
    device: torch.device
    rank: int
    world: int
    num_threads: int = 1
    steps_per_epoch: int
    input_of: Callable[[Batch], torch.Tensor] = images_of
    communication: Communication | None = None
    cursor: Cursor = START
    learning_rate: float = 0.0
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    @property
    def global_step(self) -> int:
        return self.cursor.epoch * self.steps_per_epoch + self.cursor.step

    @property
    def compiles(self) -> bool:
        return self.config.loop.compiles(gpu=self.device.type == "cuda")
