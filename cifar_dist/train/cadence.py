"""Decides after which steps and epochs ranks log, store checkpoints and stop. All ranks decide the same."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from cifar_dist.config import CheckpointConfig, Config
from cifar_dist.run.checkpoint import LOWEST, Score
from cifar_dist.train.saver import Saver
from cifar_dist.train.state import TrainState

AGREE_SECONDS = 2.0  # between agreements of the ranks; each costs some milliseconds
MOST_STEPS = 1000  # between agreements
NOTICE_SECONDS = 10.0  # between checkpoints while a node is about to be taken away


class Agreement(NamedTuple):
    """Whether a checkpoint is due, the number of steps until the next agreement, and whether training stops."""

    is_due: bool
    num_steps: int
    stops: bool


class EpochEnd(NamedTuple):
    """Whether the end of an epoch is stored, and whether it is the best so far."""

    is_due: bool
    is_best: bool


class RankZero:
    """Decides for all ranks, from the time, from Ray's notices of leaving nodes and from the driver's requests.

    `best`: the best score that the run has stored.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        saver: Saver,
        a_node_is_leaving: Callable[[], bool],
        asks_to_stop: Callable[[], bool],
        say: Callable[[str], None],
        best: Score = LOWEST,
    ) -> None:
        self.best = best
        self.config, self._saver, self._asks_to_stop, self._say = config, saver, asks_to_stop, say
        self._a_node_is_leaving, self._is_noticed = a_node_is_leaving, False

    def decide(self, seconds_per_step: float) -> Agreement:
        waited, is_leaving = self._waited(), self._a_node_is_leaving()
        is_first, self._is_noticed = is_leaving and not self._is_noticed, is_leaving
        by_time = waited >= self.config.checkpoint_every_seconds > 0
        if is_first:
            self._say("a node is about to be taken away: storing a checkpoint")
        is_due = is_first or by_time or (is_leaving and waited >= NOTICE_SECONDS)
        num_steps = max(1, min(round(AGREE_SECONDS / seconds_per_step), MOST_STEPS))
        return Agreement(is_due, num_steps, self._asks_to_stop())

    def decide_epoch(self, score: Score) -> EpochEnd:
        """Decides on the end of an epoch with this score of its validation.

        A score equal to the best counts as the best, as among stored checkpoints, where the newer one wins."""
        is_best = LOWEST < score >= self.best
        self.best = max(self.best, score)
        by_time = self._waited() >= self.config.checkpoint_every_seconds
        return EpochEnd(is_due=by_time or is_best, is_best=is_best)

    def _waited(self) -> float:
        return time.monotonic() - self._saver.saved_at


class Cadence:
    """Tells a rank when to log, store and stop. `zero`: on rank 0 only.

    All ranks call each method after the same step.
    """

    def __init__(self, config: Config, zero: RankZero | None) -> None:
        self.config, self._zero = config, zero
        self.stops = False
        self._is_due_at_end = False  # a checkpoint became due with the epoch's last step
        self._num_left = self._num_agreed = 1
        self._agreed_at = time.monotonic()

    def is_logged(self, state: TrainState) -> bool:
        return state.global_step % self.config.loop.log_every_steps == 0

    def is_checkpoint_due(self, state: TrainState) -> bool:
        """Counts a step. False at an epoch's end, which is validated before it is stored."""
        self._num_left -= 1
        is_due = self._num_left <= 0 and self._agree(state)
        every = self.config.checkpoint.checkpoint_every_steps
        is_due = is_due or self.stops or (every > 0 and state.global_step % every == 0)
        self._is_due_at_end = is_due and not is_inside(state)
        return is_due and is_inside(state)

    def end_of_epoch(self, state: TrainState, score: Score) -> EpochEnd:
        """Returns whether the epoch that has ended is stored, and whether it is the best. The last one always is."""
        decided = self._zero.decide_epoch(score) if self._zero else None
        is_due, is_best = map(bool, share(decided, len(EpochEnd._fields), state))
        is_last = state.cursor.epoch >= self.config.loop.epochs
        return EpochEnd(is_due=is_due or is_last or self._is_due_at_end, is_best=is_best)

    def ends_here(self, state: TrainState) -> bool:
        """Whether training stops inside the epoch. At an epoch's end, validation comes before the stop."""
        return self.stops and is_inside(state)

    def _agree(self, state: TrainState) -> bool:
        seconds_per_step = max((time.monotonic() - self._agreed_at) / self._num_agreed, 1e-6)
        decided = self._zero.decide(seconds_per_step) if self._zero else None
        is_due, num_steps, stops = share(decided, len(Agreement._fields), state)
        self._num_left = self._num_agreed = num_steps
        self._agreed_at, self.stops = time.monotonic(), bool(stops)
        return bool(is_due)


def share(decided: tuple[int, ...] | None, num_values: int, state: TrainState) -> list[int]:
    """Returns rank 0's decision on every rank. `decided`: None on the others."""
    values = torch.tensor(decided or (0,) * num_values, dtype=torch.int64, device=state.device)
    if state.world > 1:
        dist.broadcast(values, 0)
    return values.tolist()


def is_inside(state: TrainState) -> bool:
    """Whether the cursor is before the end of its epoch."""
    return state.cursor.step < state.steps_per_epoch
