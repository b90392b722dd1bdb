"""Logs loss, accuracy and rates of the epoch so far."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.train.diagnosis import Diagnosis
from cifar_dist.train.loop import Clock, Lap, sum_over_ranks
from cifar_dist.train.rank_state import check_loss
from cifar_dist.train.reporting import Place, Reporter
from cifar_dist.train.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the log whose values the device may still have to compute. `totals`: as in TrainState, of all ranks."""

    place: Place
    step: int
    learning_rate: float
    totals: torch.Tensor
    lap: Lap


class StepLog:
    """Logs lines of the kind `step`. All ranks call each method after the same step.

    Where a device works behind the host, a line is finished when the next one begins or at `finish`, so that training
    does not wait for the device. `defers`: whether it does.
    """

    def __init__(
        self, state: TrainState, reporter: Reporter, diagnosis: Diagnosis, latest: Callable[[], Checkpoint | None]
    ) -> None:
        self.state, self.reporter, self.diagnosis, self._latest = state, reporter, diagnosis, latest
        self.defers = state.device.type == "cuda"
        self._open: Line | None = None

    def begin(self, clock: Clock) -> None:
        """Begins a line with the totals of now. Raises UserError on every rank if a loss is not finite."""
        self.finish()
        state = self.state
        totals, lap = on_host(sum_over_ranks(state.totals)), clock.lap()
        self._open = Line(
            place=self.reporter.place(),
            step=state.cursor.step,
            learning_rate=state.learning_rate,
            totals=totals,
            lap=lap,
        )
        if not self.defers:
            self.finish()

    def finish(self) -> None:
        """Logs the line that was begun, if there is one. Raises UserError on every rank if its loss is not finite."""
        line, self._open = self._open, None
        if line is None:
            return
        rates = line.lap.rates()  # first: waits until the totals are on the host
        loss, correct, seen = line.totals.tolist()
        check_loss(loss, line.place.global_step, self._latest)
        values = {"step": line.step, "train_loss": loss / seen, "train_accuracy": correct / seen}
        values |= {"learning_rate": line.learning_rate, **rates}
        self.reporter.record("step", line.place, **values)
        self.reporter.send(values, line.place)
        self.diagnosis.check_training(correct / seen, int(seen), line.place)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy in the host's memory, which has the values once the device has come so far."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
