"""Sends a rank's messages to the driver and writes the run's log. Only rank 0 does either."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from cifar_dist.data.batch import Batch
from cifar_dist.run.log import RunLog
from cifar_dist.train.state import TrainState


class Place(NamedTuple):
    """The epoch and the step of a run at which something was measured."""

    epoch: int
    global_step: int


class Reporter:
    """Sends the messages and log lines of one attempt, each with the current cursor.

    `progress` is the driver's actor. `log` is the run's log once rank 0 owns the run, and None on other ranks.
    """

    def __init__(self, progress: Any, state: TrainState) -> None:
        self.progress, self.state = progress, state
        self.log: RunLog | None = None
        self._warned = set[str]()

    def say(self, message: str) -> None:
        if self.state.rank == 0:
            self.progress.say.remote(message)

    def warn(self, kind: str, message: str, place: Place | None = None, **values: Any) -> None:
        """Prints a warning once per attempt and records it once per run, at the given place or else the current one."""
        if self.log and kind not in self._warned:
            self._warned.add(kind)
            self.say(f"WARNING: {message}")
            if kind not in self.log.warnings:
                self.record("warning", place, warning=kind, message=message, **values)

    def note_checkpoint(self, _name: str, fault: str) -> None:
        """Warns of a damaged checkpoint that is passed over."""
        if fault:
            self.say(f"WARNING: {fault}; going on from the checkpoint before it")

    def place(self) -> Place:
        return Place(self.state.cursor.epoch, self.state.global_step)

    def record(self, kind: str, place: Place | None = None, **values: Any) -> None:
        """Adds a line to the log, of the given place or else of the current one."""
        if self.log:
            self.log.add(kind, *(place or self.place()), **values)

    def send(self, values: dict[str, Any], place: Place | None = None) -> None:
        """Sends metrics to the driver, for its display and for Prometheus."""
        if self.log:
            position = (place or self.place())._asdict()
            self.progress.update.remote({**position, "steps_per_epoch": self.state.steps_per_epoch, **values})


def record_samples(reporter: Reporter, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches. With --record-samples, logs ids and flips of each global batch. All ranks call it."""
    state = reporter.state
    for batch in batches:
        if state.config.loop.record_samples:
            assert batch.augment is not None
            parts: list[Any] = [None] * state.world
            num_mine = len(batch.ids) if batch.num_counted else 0
            dist.all_gather_object(parts, (batch.ids[:num_mine].tolist(), batch.augment.flips[:num_mine].tolist()))
            if reporter.log:
                ids, flips = ([x for part in column for x in part] for column in zip(*parts, strict=True))
                reporter.log.add("samples", state.cursor.epoch, state.global_step + 1, ids=ids, flips=flips)
        yield batch
