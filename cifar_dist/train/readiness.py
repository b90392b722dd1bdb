"""Waits of the ranks for each other while some of them have work of their own, such as staging, which may take
minutes."""

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
    """A rank has stopped working: Ray Train starts the group again."""


class Readiness:
    """Lets every rank work, and go on when all are done: `with readiness.together(): ...`.

    A thread of each rank tells the others in between whether its work goes on. A process that is stopped does not
    tell, and a call that hangs uses no CPU time: after `limit_seconds` of either the other ranks raise, and a rank
    that hangs itself ends.
    """

    def __init__(self, limit_seconds: float) -> None:
        self.limit_seconds, self.rank, self.world = limit_seconds, dist.get_rank(), dist.get_world_size()
        # A group of its own: a thread must not share one with the collectives of the main thread.
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_seconds))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises RankHangsError, or torch's error for a rank that does not answer, after this rank's own work."""
        is_done, failures = threading.Event(), list[Exception]()
        clock = time.pthread_getcpuclockid(threading.get_ident())
        thread = threading.Thread(target=self._tell, args=(clock, is_done, failures), daemon=True)
        thread.start()
        yield
        is_done.set()
        thread.join()
        if failures:
            raise failures[0]

    def _tell(self, clock: int, is_done: threading.Event, failures: list[Exception]) -> None:
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
                if waited > self.limit_seconds:
                    self._give_up(moved_at.index(min(moved_at)), waited)
        except Exception as error:
            failures.append(error)

    def _give_up(self, rank: int, seconds: float) -> None:
        text = f"rank {rank} has done nothing for {seconds:.0f} s while others wait for it"
        if rank == self.rank:
            print(text, file=sys.stderr, flush=True)
            os._exit(1)  # its main thread is not there to raise anything
        raise RankHangsError(text)
