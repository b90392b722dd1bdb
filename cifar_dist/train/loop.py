"""One epoch of training, and validation."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from cifar_dist.data.batch import Batch
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision
from cifar_dist.train.communication import Communication, Wait
from cifar_dist.train.moment import Moment
from cifar_dist.train.state import images_of
from cifar_dist.train.step import Step

CPU = torch.device("cpu")


class Clock:
    """Splits wall time into waiting for data, waiting for gradients and the rest. Counts the images of all ranks."""

    def __init__(self, communication: Communication | None = None, device: torch.device = CPU) -> None:
        self.device, self.start = device, Moment(device)
        self.data_wait_seconds, self.communication_seconds, self.num_images = 0.0, 0.0, 0
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

    def lap(self) -> "Lap":
        """Returns the times from the start until now. Does not wait for the device."""
        waits = self.communication.take() if self.communication else []
        return Lap(self, Moment(self.device), self.num_images, self.data_wait_seconds, waits)


class Lap(NamedTuple):
    """The times of a clock from its start to `end`. `waits`: for gradients, since the lap before."""

    clock: Clock
    end: Moment
    num_images: int
    data_wait_seconds: float
    waits: list[Wait]

    def rates(self) -> dict[str, float]:
        """Returns rates and seconds. Waits until `end` has passed. Called once for each lap, in order."""
        seconds = max(self.end.seconds_since(self.clock.start), 1e-9)
        self.clock.communication_seconds += sum(end.seconds_since(start) for start, end in self.waits)
        communication_seconds = self.clock.communication_seconds
        return {
            "images_per_second": round(self.num_images / seconds, 2),
            "data_wait_share": round(self.data_wait_seconds / seconds, 4),
            "data_wait_seconds": round(self.data_wait_seconds, 3),
            "communication_seconds": round(communication_seconds, 3),
            "compute_seconds": round(seconds - self.data_wait_seconds - communication_seconds, 3),
            "seconds": round(seconds, 3),
        }


def train_epoch(step: Step, batches: Iterable[Batch], after_step: Callable[[Clock], None]) -> Clock:
    """Trains from the cursor to the end of its epoch. Only `after_step` may wait for the device."""
    state = step.state
    state.trainable.train()
    clock = Clock(state.communication, state.device)
    for batch in clock.waiting(batches):
        step(batch)
        state.cursor = Cursor(state.cursor.epoch, state.cursor.step + 1)
        after_step(clock)
    return clock


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
        inputs = input_of(batch)
        with precision.autocast():
            logits = model(inputs)
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
