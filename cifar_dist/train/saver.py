"""Stores a run's log and checkpoints from rank 0 in a thread of its own, while training goes on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cifar_dist.run.checkpoint import Cursor, Mark, State
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.log import RunLog, Taken
from cifar_dist.run.ownership import Attempts
from cifar_dist.storage import Folder


def copied(tree: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The nested dicts and lists with every tensor copied."""
    if isinstance(tree, torch.Tensor):
        return copy(tree)
    if isinstance(tree, dict):
        return {key: copied(value, copy) for key, value in tree.items()}
    return [copied(value, copy) for value in tree] if isinstance(tree, list) else tree


class Saver:
    """The log and the checkpoints of one attempt of a run, stored in order by one thread.

    What went wrong there is raised by the next call. Each write is fenced: a UserError if the run was taken over.
    """

    def __init__(
        self,
        run_uri: str,
        driver: str,
        attempt: int,
        device: torch.device,
        global_step: int,
        mark: Mark | None,
        num_kept: int,
        retry_seconds: float,
    ) -> None:
        self.attempt, self.num_kept = attempt, num_kept
        self.attempts = Attempts(Folder(run_uri, retry_seconds), driver)
        self._fence()  # the log is cut at the mark, which may be behind what a newer attempt has stored
        self.log = RunLog(run_uri, global_step, mark, retry_seconds)
        self.checkpoints = Checkpoints(run_uri, retry_seconds)
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stall_seconds = 0.0  # for which save() held up its caller
        self.saved_at = time.monotonic()
        self._pool, self._last = ThreadPoolExecutor(1), Future[None]()
        self._last.set_result(None)

    def wait(self) -> None:
        """Until all is stored."""
        self._last.result()

    def close(self) -> None:
        """The same, for good."""
        self.wait()
        self._pool.shutdown()
        self.log.close()

    def save(self, cursor: Cursor, state: State, meta: dict[str, Any]) -> None:
        """Copies the state where it lies, which takes milliseconds, and stores the copy by and by.

        Waits for the checkpoint before: at most one copy is there at a time.
        """
        start = time.perf_counter()
        self.wait()
        taken = self.log.take()
        copy = State(**copied(vars(state), torch.clone) | {"log": taken.mark})
        ready = None
        if self.side_stream:
            ready = torch.cuda.Event()
            ready.record()
        self._last = self._pool.submit(self._store, cursor, copy, taken, meta, ready)
        self.saved_at = time.monotonic()
        self.stall_seconds += time.perf_counter() - start

    def flush_if_due(self) -> None:
        """Stores the log if that is due and nothing else is being stored."""
        if self.log.is_due and self._last.done():
            self.wait()
            self._last = self._pool.submit(self._store_log, self.log.take())

    def _store(
        self, cursor: Cursor, state: State, taken: Taken, meta: dict[str, Any], ready: torch.cuda.Event | None
    ) -> None:
        """The run's lines, the checkpoint, and away with the old ones."""
        if ready:  # to the host beside the training, once the copy is made
            with torch.cuda.stream(self.side_stream):
                ready.wait()
                state = State(**copied(vars(state), torch.Tensor.cpu))
        self._store_log(taken)
        self.checkpoints.write(cursor, self.attempt, state, meta, self._fence)
        self._fence()
        self.checkpoints.keep(self.num_kept, self.attempt)

    def _store_log(self, taken: Taken) -> None:
        self._fence()
        self.log.store(taken)

    def _fence(self) -> None:
        self.attempts.check(self.attempt)
