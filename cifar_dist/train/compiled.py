"""Which network is compiled, and for which batches."""

import torch
from torch import nn

from cifar_dist.config import LoopConfig
from cifar_dist.data import order


class CompiledForFullBatches(nn.Module):
    """A network that is compiled for batches of the given sizes, and runs as it is for others.

    An epoch's smaller last batch would else be compiled too, which takes many seconds to save milliseconds an epoch.
    """

    def __init__(self, network: nn.Module, sizes: set[int]) -> None:
        super().__init__()
        self.network, self.sizes = network, sizes
        self.compiled = torch.compile(network, dynamic=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.compiled if len(x) in self.sizes else self.network)(x)


def full_part(loop: LoopConfig, num_train: int, rank: int, world: int) -> int:
    """Returns the number of images in a rank's part of a full step."""
    batch = min(loop.global_batch_size, num_train)
    start, stop, _, _ = order.rank_part(0, batch, batch, rank, world)
    return stop - start


def full_sizes(loop: LoopConfig, num_train: int, rank: int, world: int) -> set[int]:
    """Returns the numbers of images in the forward passes of a rank's part of a full step."""
    num_images = full_part(loop, num_train, rank, world)
    num_chunks = order.num_micro_batches(num_images, loop.accumulation_steps)
    return {len(chunk) for chunk in torch.arange(num_images).tensor_split(num_chunks)}
