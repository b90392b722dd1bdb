"""One epoch of training, and validation."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.loader import Batch
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision
from cifar_dist.train.communication import Communication
from cifar_dist.train.optim import Muon, set_step


class Clock:
    """Splits wall time into waiting for data, waiting for gradients and the rest. Counts the images of all ranks."""

    def __init__(self, communication: Communication | None = None) -> None:
        self.start, self.data_wait_seconds, self.num_images = time.perf_counter(), 0.0, 0
        self.communication = communication
        if communication:
            communication.reset()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.data_wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            self.num_images += batch.global_size
            yield batch

    def rates(self) -> dict[str, float]:
        communication_seconds = self.communication.seconds() if self.communication else 0.0
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "images_per_second": round(self.num_images / seconds, 2),
            "data_wait_share": round(self.data_wait_seconds / seconds, 4),
            "data_wait_seconds": round(self.data_wait_seconds, 3),
            "communication_seconds": round(communication_seconds, 3),
            "compute_seconds": round(seconds - self.data_wait_seconds - communication_seconds, 3),
            "seconds": round(seconds, 3),
        }


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
    average: AveragedModel | None
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


def train_epoch(state: TrainState, batches: Iterable[Batch], after_step: Callable[[Clock], None]) -> Clock:
    """Trains from the cursor to the end of its epoch. Only `after_step` may wait for the device."""
    config, seed = state.config, state.config.loop.seed
    num_steps = config.loop.epochs * state.steps_per_epoch
    state.trainable.train()
    clock = Clock(state.communication)
    for batch in clock.waiting(batches):
        state.learning_rate = set_step(state.optimizers, config.optim, state.global_step, num_steps)
        torch.manual_seed(order.step_seed(seed, *state.cursor, state.rank))
        state.totals += backward(state, batch)
        update(state)
        if state.average is not None:
            state.average.update_parameters(state.model)
        state.cursor = Cursor(state.cursor.epoch, state.cursor.step + 1)
        after_step(clock)
    return clock


def backward(state: TrainState, batch: Batch) -> torch.Tensor:
    """Adds the gradient of the mean loss over the *global* batch; returns this rank's float64 [3] totals.

    DistributedDataParallel averages over ranks, so each rank scales its summed loss by world / global size. The
    result is exact even if the ranks have different numbers of images.
    """
    max_chunks = max(1, len(batch.labels) // order.LEAST_PER_RANK)  # a small last step is split into fewer chunks
    num_chunks = min(state.config.loop.accumulation_steps, max_chunks)
    chunks = list(
        zip(state.input_of(batch).tensor_split(num_chunks), batch.labels.tensor_split(num_chunks), strict=True)
    )
    counted = batch.num_counted > 0
    totals = torch.zeros(3, dtype=torch.float64, device=state.device)
    if state.communication:
        state.communication.num_rows = -(-batch.global_size // order.num_rank_parts(batch.global_size, state.world))
    for i, (inputs, labels) in enumerate(chunks):
        last = i == num_chunks - 1
        ddp = state.trainable if isinstance(state.trainable, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and not last else nullcontext():
            with state.precision.autocast():
                logits = state.trainable(inputs)
            smoothing = state.config.optim.label_smoothing
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum") * counted
            state.precision.scaler.scale(loss * (state.world / batch.global_size)).backward()
        if last and state.communication:
            state.communication.end()
        correct = (logits.argmax(1) == labels).sum() * counted
        totals += torch.stack(
            [loss.detach().double(), correct.double(), torch.full_like(totals[0], len(labels) * counted)]
        )
    return totals


def update(state: TrainState) -> None:
    """Runs one optimizer step and clears the gradients."""
    optimizers, scaler, clip_norm = state.optimizers, state.precision.scaler, state.config.optim.clip_norm
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            optimizer.take_gradients()
    if clip_norm:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip_norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    state.model.zero_grad(set_to_none=True)


@torch.inference_mode()
def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    precision: Precision,
    input_of: Callable[[Batch], torch.Tensor] = images_of,
) -> torch.Tensor:
    """Returns this rank's float64 [3] totals (loss sum, correct, seen), computed in inference mode."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=precision.device)
    for batch in batches:
        with precision.autocast():
            logits = model(input_of(batch))
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum")
        correct = (logits.argmax(1) == batch.labels).sum()
        totals += torch.stack([loss.double(), correct.double(), torch.full_like(totals[0], len(batch.labels))])
    model.train(was_training)
    return totals


def sum_over_ranks(totals: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a float64 tensor over all ranks. Integers up to 2**53 stay exact."""
    summed = totals.clone()
    if dist.is_initialized():
        dist.all_reduce(summed)
    return summed
