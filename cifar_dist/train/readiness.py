"""Lets ranks wait for each other during long work of some ranks, such as staging, which may take minutes."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOOK_SECONDS = 0.5


class RankHangsError(Exception):
    """A rank has stopped working. Ray Train restarts the worker group."""


class Readiness:
    """Waits, after each rank's own work, until all ranks are done: `with readiness.together(): ...`.

    A thread of each rank regularly tells the other ranks whether its work advances. A stopped process sends nothing,
    and a hanging call uses no CPU time. After `limit_seconds` of either, the other ranks raise, and a hanging rank
    exits.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds, self.rank, self.world = limit_seconds, dist.get_rank(), dist.get_world_size()
        # A separate process group, because two threads must not share one.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_seconds))

    @contextmanager
    def together(self, *, least_seconds: float = 0.0) -> Iterator[None]:
        """After this rank's work, raises RankHangsError, or torch's error if another rank does not answer.

        `least_seconds`: for work that may use no CPU time of this process for so long."""
        limit = max(self.limit_seconds, least_seconds)
        is_done, failures = threading.Event(), list[Exception]()
        clock = time.pthread_getcpuclockid(threading.get_ident())
        thread = threading.Thread(target=self._exchange_status, args=(clock, limit, is_done, failures), daemon=True)
        thread.start()
        yield
        is_done.set()
        thread.join()
        if failures:
            raise failures[0]

    def _exchange_status(
        self, clock: int, limit_seconds: float, is_done: threading.Event, failures: list[Exception]
    ) -> None:
        used, moved_at = time.clock_gettime(clock), [time.monotonic()] * self.world
        every = torch.zeros(self.world, 2, dtype=torch.bool)
        try:
            while not every[:, 0].all():
                is_ready, before = is_done.wait(LOOK_SECONDS), used
                used = time.clock_gettime(clock)
                dist.all_gather_into_tensor(every, torch.tensor([[is_ready, used > before]]), group=self._group)
                now = time.monotonic()
                moved_at = [now if any(row) else at for row, at in zip(every.tolist(), moved_at, strict=True)]
                waited = now - min(moved_at)
                if waited > limit_seconds:
                    self._give_up(moved_at.index(min(moved_at)), waited)
        except Exception as error:
            failures.append(error)

    def _give_up(self, rank: int, seconds: float) -> None:
        text = f"rank {rank} has done nothing for {seconds:.0f} s while others wait for it"
        if rank == self.rank:
            print(text, file=sys.stderr, flush=True)
            os._exit(1)  # the main thread hangs and cannot raise
        raise RankHangsError(text)
