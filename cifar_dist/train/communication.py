"""How workers exchange gradients (all-reduce or factors, fp32 or bf16), and the time that training waits for it."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.cpus import instruction_sets
from cifar_dist.train.moment import Moment

BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default: a larger gradient is exchanged alone

Wait = tuple[Moment, Moment]


class Communication:
    """Measures the time from the last gradient of each backward pass to the end of the gradient exchange.

    Communication that overlaps with the backward pass costs no time and is not counted. Waiting for a slower worker
    is counted. On a GPU, both moments are in the compute stream. `num_rows` is the largest number of images of any
    rank in this step.
    """

    num_rows = 1

    def __init__(self, model: DistributedDataParallel, gradient_dtype: str, device: torch.device) -> None:
        self.device = device
        self.exchange = bf16_compress_hook if gradient_dtype == "bf16" else allreduce_hook
        self.reset()
        model.register_comm_hook(dist.group.WORLD, self._hook)

    def reset(self) -> None:
        self._last = Moment(self.device)
        self._waits: list[Wait] = []

    def _hook(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            self._last = Moment(self.device)
        return self.exchange(group, bucket)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, k] on each rank -> [world * num_rows, k]: the rows of all ranks, zero-padded to `num_rows` a rank."""
        start = Moment(self.device)
        padded = F.pad(rows, (0, 0, 0, self.num_rows - len(rows))).contiguous()
        every = padded.new_empty(dist.get_world_size() * self.num_rows, rows.shape[1])
        dist.all_gather_into_tensor(every, padded)
        self._waits.append((start, Moment(self.device)))
        return every

    def end(self) -> None:
        """Ends the measurement of a step. Call it after the backward pass that exchanged gradients."""
        self._waits.append((self._last, Moment(self.device)))

    def take(self) -> list[Wait]:
        """Returns start and end of each wait since the last reset or take."""
        taken, self._waits = self._waits, []
        return taken


class Factored(torch.autograd.Function):
    """F.linear(x [n, i], weight [o, i], bias [o]) -> [n, o].

    The backward pass returns the gradients of weight and bias as means over ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, communication: Communication
    ) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.communication = communication
        return F.linear(x, weight, bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        every = ctx.communication.gather(gradient) / dist.get_world_size()
        inputs = ctx.communication.gather(x)
        return gradient @ weight, every.T @ inputs, every.float().sum(0), None


class FactoredLinear(nn.Linear):
    """A Dense layer whose ranks exchange the two factors of the weight gradient: inputs and output gradients.

    Each rank multiplies the factors of all ranks itself (sufficient factors: Xie et al., arXiv:1511.08486)."""

    communication: Communication

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return Factored.apply(x, self.weight, self.bias, self.communication)


def factor_layers(model: nn.Module, num_rows: int, dtype: torch.dtype) -> list[FactoredLinear]:
    """Makes the Dense layers FactoredLinear for which factors are cheaper to send. Returns these layers.

    A layer is chosen if its factors, for `num_rows` images in `dtype`, take at most a quarter of an all-reduce, which
    moves the gradient twice. Larger factors need more multiplication than the exchange saves. The gradient must also
    exceed BUCKET_BYTES, since each collective has a fixed cost. If the ranks' processors differ, no layer is chosen:
    the ranks would round products differently, and their weights would drift apart.
    """
    found = []
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.weight.requires_grad and layer.bias is not None:
            gradient_bytes = layer.weight.numel() * layer.weight.element_size()
            factor_bytes = num_rows * sum(layer.weight.shape) * dtype.itemsize
            if gradient_bytes > BUCKET_BYTES and 2 * factor_bytes <= gradient_bytes:
                found.append(layer)
    if found:
        processors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(processors, (instruction_sets(), torch.get_num_threads()))
        if any(processor != processors[0] for processor in processors):
            return []
    for layer in found:
        layer.__class__ = FactoredLinear
        for parameter in layer.parameters():
            dist.broadcast(parameter.detach(), 0)  # as DistributedDataParallel does with its own parameters
    return found  # type: ignore[return-value]


def parallel(
    model: nn.Module, device: torch.device, gradient_dtype: str, factors: tuple[int, torch.dtype] | None = None
) -> tuple[DistributedDataParallel, Communication]:
    """Wraps the model (compiled or not) in DistributedDataParallel. Each rank keeps its own moving statistics.

    `factors`: the images of a step on all ranks and their compute dtype, for `factor_layers`. None: no factors.
    """
    layers = factor_layers(model, *factors) if factors else []
    factored = {parameter for layer in layers for parameter in layer.parameters()}
    # Buffers are left alone, neither sent at the start nor before each step: each rank has its own moving statistics.
    ignored = [name for name, parameter in model.named_parameters() if parameter in factored]
    model._ddp_params_and_buffers_to_ignore = [*ignored, *(name for name, _ in model.named_buffers())]  # type: ignore[assignment]
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    communication = Communication(wrapped, gradient_dtype, device)
    for layer in layers:
        layer.communication = communication
    return wrapped, communication
