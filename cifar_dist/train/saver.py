"""Stores a run's log and checkpoints from rank 0, in a thread, while training continues."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from cifar_dist.run.checkpoint import CheckpointState, Cursor, Mark
from cifar_dist.run.folder import Run
from cifar_dist.run.log import RunLog, Taken


def copied(tree: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns nested dicts and lists with every tensor copied by `copy`."""
    if isinstance(tree, torch.Tensor):
        return copy(tree)
    if isinstance(tree, dict):
        return {key: copied(value, copy) for key, value in tree.items()}
    return [copied(value, copy) for value in tree] if isinstance(tree, list) else tree


class HostMemory:
    """Pinned host memory for the tensors of one state, kept from copy to copy.

    Copies to it need no lock of the driver, which training's own copies would wait for."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []

    def copy(self, state: CheckpointState) -> CheckpointState:
        """Returns the state on the host; the next call overwrites it. Waits for the current stream."""
        num_used = 0

        def to_host(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_used
            if tensor.device.type == "cpu":
                return tensor
            if num_used == len(self._tensors):
                self._tensors.append(torch.empty(0))
            kept = self._tensors[num_used]
            if (kept.shape, kept.dtype, kept.stride()) != (tensor.shape, tensor.dtype, tensor.stride()):
                kept = self._tensors[num_used] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            num_used += 1
            return kept.copy_(tensor, non_blocking=True)

        on_host = CheckpointState(**copied(vars(state), to_host))
        if num_used:
            torch.cuda.current_stream().synchronize()
        return on_host


class Saver:
    """Stores the log and the checkpoints of one attempt of a run, in order, in one thread.

    An error in the thread is raised by the next call. Each write is fenced: it raises UserError if another job has
    taken over the run.
    """

    def __init__(
        self,
        run: Run,
        driver: str,
        attempt: int,
        *,
        device: torch.device,
        global_step: int,
        mark: Mark | None,
        num_kept: int,
    ) -> None:
        self.attempt, self.num_kept = attempt, num_kept
        self.attempts, self.checkpoints = run.attempts(driver), run.checkpoints
        self._fence()  # the log is cut at the mark, so a superseded attempt would delete newer lines
        self.log = RunLog(run.folder, global_step, mark)
        self.host_memory = HostMemory()
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stall_seconds = 0.0  # time that save() took from training
        self.saved_at = time.monotonic()
        self._pool, self._last = ThreadPoolExecutor(1), Future[None]()
        self._last.set_result(None)

    def wait(self) -> None:
        """Waits until all pending writes are done."""
        self._last.result()

    def close(self) -> None:
        """Waits for pending writes, ends the thread and closes the log."""
        self.wait()
        self._pool.shutdown()
        self.log.close()

    def save(self, cursor: Cursor, state: CheckpointState, meta: dict[str, Any]) -> None:
        """Copies the state on its device, which takes milliseconds, and stores the copy in the background.

        First waits for the previous checkpoint, so that at most one copy exists at a time.
        """
        start = time.perf_counter()
        self.wait()
        taken = self.log.take()
        copy = CheckpointState(**copied(vars(state), torch.clone) | {"log": taken.mark})
        ready = None
        if self.side_stream:
            ready = torch.cuda.Event()
            ready.record()
        self._last = self._pool.submit(self._store, cursor, copy, taken, meta, ready)
        self.saved_at = time.monotonic()
        self.stall_seconds += time.perf_counter() - start

    def flush_if_due(self) -> None:
        """Stores the log if it is due and no other write is running."""
        if self.log.is_due and self._last.done():
            self.wait()
            self._last = self._pool.submit(self._store_log, self.log.take())

    def _store(
        self, cursor: Cursor, state: CheckpointState, taken: Taken, meta: dict[str, Any], ready: torch.cuda.Event | None
    ) -> None:
        """Stores the log and the checkpoint, then deletes old checkpoints."""
        if ready:  # once the copy is made, move it to the host in parallel with training
            with torch.cuda.stream(self.side_stream):
                ready.wait()
                state = self.host_memory.copy(state)
        self._store_log(taken)
        self.checkpoints.write(cursor, self.attempt, state, meta, self._fence)
        self._fence()
        self.checkpoints.keep(self.num_kept, self.attempt)

    def _store_log(self, taken: Taken) -> None:
        self._fence()
        self.log.store(taken)

    def _fence(self) -> None:
        self.attempts.check(self.attempt)
