"""Decides after which steps ranks log, store checkpoints and stop. All ranks decide the same."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from cifar_dist.config import CheckpointConfig, Config
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


class RankZero:
    """Decides for all ranks, from the time, from Ray's notices of leaving nodes and from the driver's requests."""

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        saver: Saver,
        a_node_is_leaving: Callable[[], bool],
        asks_to_stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.config, self._saver, self._asks_to_stop, self._say = config, saver, asks_to_stop, say
        self._a_node_is_leaving, self._is_noticed = a_node_is_leaving, False

    def decide(self, seconds_per_step: float) -> Agreement:
        waited, is_leaving = time.monotonic() - self._saver.saved_at, self._a_node_is_leaving()
        is_first, self._is_noticed = is_leaving and not self._is_noticed, is_leaving
        by_time = waited >= self.config.checkpoint_every_seconds > 0
        if is_first:
            self._say("a node is about to be taken away: storing a checkpoint")
        is_due = is_first or by_time or (is_leaving and waited >= NOTICE_SECONDS)
        num_steps = max(1, min(round(AGREE_SECONDS / seconds_per_step), MOST_STEPS))
        return Agreement(is_due, num_steps, self._asks_to_stop())


class Cadence:
    """Tells a rank when to log, store and stop. `decide` is RankZero.decide on rank 0 and None on other ranks.

    All ranks call each method after the same step.
    """

    def __init__(self, config: Config, decide: Callable[[float], Agreement] | None) -> None:
        self.config, self._decide = config, decide
        self.stops = False
        self._num_left = self._num_agreed = 1
        self._agreed_at = time.monotonic()

    def is_logged(self, state: TrainState) -> bool:
        return state.global_step % self.config.loop.log_every_steps == 0

    def is_checkpoint_due(self, state: TrainState) -> bool:
        """Counts a step. False at an epoch's end, where the epoch stores its own checkpoint."""
        self._num_left -= 1
        is_due = self._num_left <= 0 and self._agree(state)
        every = self.config.checkpoint.checkpoint_every_steps
        is_counted = every > 0 and state.global_step % every == 0
        return is_inside(state) and (is_due or self.stops or is_counted)

    def ends_here(self, state: TrainState) -> bool:
        """Whether training stops inside the epoch. At an epoch's end, validation comes before the stop."""
        return self.stops and is_inside(state)

    def _agree(self, state: TrainState) -> bool:
        seconds_per_step = max((time.monotonic() - self._agreed_at) / self._num_agreed, 1e-6)
        agreed = self._share(self._decide(seconds_per_step) if self._decide else None, state)
        self._num_left = self._num_agreed = agreed.num_steps
        self._agreed_at, self.stops = time.monotonic(), agreed.stops
        return agreed.is_due

    def _share(self, decided: Agreement | None, state: TrainState) -> Agreement:
        """Returns rank 0's decision on every rank."""
        values = torch.tensor(decided or (0, 0, 0), dtype=torch.int64, device=state.device)
        if state.world > 1:
            dist.broadcast(values, 0)
        is_due, num_steps, stops = values.tolist()
        return Agreement(bool(is_due), num_steps, bool(stops))


def is_inside(state: TrainState) -> bool:
    """Whether the cursor is before the end of its epoch."""
    return state.cursor.step < state.steps_per_epoch
