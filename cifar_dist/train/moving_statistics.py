"""Averages, gathers and re-estimates BatchNorm's moving statistics, which differ between ranks."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from cifar_dist.data.batch import Batch
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.run.network import Precision
from cifar_dist.train.state import images_of


def trained_batchnorms(model: nn.Module) -> list[KerasBatchNorm]:
    return [m for m in model.modules() if isinstance(m, KerasBatchNorm) and m.weight.requires_grad]


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Batch],
    num_batches: int,
    precision: Precision,
    input_of: Callable[[Batch], torch.Tensor] = images_of,
) -> None:
    """Sets the moving statistics of trained BatchNorms to their means over batches. Other layers are in inference mode.

    At Keras's momentum of 0.99 moving statistics lag hundreds of steps behind the weights. Each rank uses its part of
    the batches; the results are averaged over ranks.
    """
    layers, was_training = trained_batchnorms(model), model.training
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for i, batch in enumerate(islice(batches, num_batches)):
        for layer in layers:
            layer.train()
            layer.momentum = i / (i + 1)
        inputs = input_of(batch)
        with precision.autocast():
            model(inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
    average_batchnorm_over_ranks(model)


def statistics_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the moving statistics of trained BatchNorms, which differ between ranks, by state dict name."""
    trained = set(trained_batchnorms(model))
    layers = [(name, module) for name, module in model.named_modules() if module in trained]
    return {f"{name}.{key}": buffer for name, module in layers for key, buffer in module.named_buffers()}


def gather_statistics(model: nn.Module) -> torch.Tensor:
    """Returns float32 [world, n]: each rank's moving statistics, flattened to a row."""
    buffers = [buffer.flatten() for buffer in statistics_of(model).values()]
    row = torch.cat(buffers) if buffers else torch.zeros(0)
    if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def split_statistics(model: nn.Module, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits a row [n] into moving statistics by name, in the buffers' shapes."""
    buffers = statistics_of(model)
    parts = row.split([buffer.numel() for buffer in buffers.values()])
    return {name: part.view_as(buffers[name]).clone() for name, part in zip(buffers, parts, strict=True)}


@torch.no_grad()
def set_statistics(model: nn.Module, row: torch.Tensor) -> None:
    """Sets this rank's moving statistics to the row [n]."""
    values = split_statistics(model, row)
    for name, buffer in statistics_of(model).items():
        buffer.copy_(values[name])


def average_batchnorm_over_ranks(model: nn.Module) -> None:
    """Sets the moving statistics of trained BatchNorms to the mean over ranks: each rank saw other images."""
    set_statistics(model, gather_statistics(model).mean(0))
