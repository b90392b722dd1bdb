"""Stores a run's log and checkpoints from rank 0, in a thread, while training continues."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from cifar_dist.run.checkpoint import CheckpointState, Cursor, Mark
from cifar_dist.run.folder import Run
from cifar_dist.run.log import RunLog, Taken
from cifar_dist.train.trees import mapped


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

        on_host = CheckpointState(**mapped(vars(state), torch.Tensor, to_host))
        if num_used:
            torch.cuda.current_stream().synchronize()
        return on_host


class Write(NamedTuple):
    """A write in the saver's thread. `copy` holds a checkpoint's state until its write begins, None for the log."""

    outcome: Future[None]
    copy: list[CheckpointState] | None = None
    is_best: bool = False


class Saver:
    """Stores the log and the checkpoints of one attempt of a run, in order, in one thread.

    An error in the thread is raised by the next call, and nothing is written after it. Each write is fenced: it raises
    UserError if another job has taken over the run. `may_drop`: whether a checkpoint that waits may give its place to a
    newer one.
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
        may_drop: bool = True,
    ) -> None:
        self.attempt, self.num_kept, self.may_drop = attempt, num_kept, may_drop
        self.attempts, self.checkpoints = run.attempts(driver), run.checkpoints
        self._fence()  # the log is cut at the mark, so a superseded attempt would delete newer lines
        self.log = RunLog(run.folder, global_step, mark)
        self.host_memory = HostMemory()
        self.side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.stall_seconds = 0.0  # time that save() took from training
        self.saved_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1)
        self._writes: list[Write] = []  # in order, those that are not known to be done
        self._error: BaseException | None = None  # of the thread

    def wait(self) -> None:
        """Waits until all pending writes are done."""
        while self._writes:
            self._finish_first()

    def close(self) -> None:
        """Waits for pending writes, ends the thread and closes the log."""
        self.wait()
        self._pool.shutdown()
        self.log.close()

    def save(self, cursor: Cursor, state: CheckpointState, meta: dict[str, Any], *, is_best: bool = False) -> None:
        """Copies the state on its device, which takes milliseconds, and stores the copy in the background.

        One checkpoint is written at a time, and the next one waits. A newer one takes its place, unless only the
        waiting one is the best (`is_best`): then this call waits for the write before. So training does not wait for a
        storage that takes longer than an epoch, and there are two copies at most.
        """
        start = time.perf_counter()
        self._make_room(is_best)
        taken = self.log.take()
        copy = [CheckpointState(**mapped(vars(state), torch.Tensor, torch.clone) | {"log": taken.mark})]
        ready = None
        if self.side_stream:
            ready = torch.cuda.Event()
            ready.record()
        self._submit_log(taken)
        outcome = self._pool.submit(self._run, self._store, cursor, copy, meta, ready)
        self._writes.append(Write(outcome, copy, is_best))
        self.saved_at = time.monotonic()
        self.stall_seconds += time.perf_counter() - start

    def flush_if_due(self) -> None:
        """Stores the log if it is due and no other write is running."""
        if self.log.is_due and all(write.outcome.done() for write in self._writes):
            self.wait()
            self._submit_log(self.log.take())

    def _submit_log(self, taken: Taken) -> None:
        self._writes.append(Write(self._pool.submit(self._run, self._store_log, taken)))

    def _run(self, write: Callable[..., None], *args: Any) -> None:
        """Runs a write in the thread. After an error none runs: a checkpoint must not name a log that is not stored."""
        if self._error:
            raise self._error
        try:
            write(*args)
        except BaseException as error:
            self._error = error
            raise

    def _make_room(self, is_best: bool) -> None:
        """Drops the checkpoint that waits, with its copy, or waits for the one before it."""
        while self._writes and self._writes[0].outcome.done():
            self._finish_first()
        checkpoints = [write for write in self._writes if write.copy is not None]
        if len(checkpoints) < 2:
            return
        running, waiting = checkpoints
        may_drop = self.may_drop and (is_best or not waiting.is_best)
        if may_drop and waiting.copy is not None and waiting.outcome.cancel():
            self._writes.remove(waiting)
            waiting.copy.clear()  # the pool keeps what was cancelled until its turn comes
        else:
            while running in self._writes:
                self._finish_first()

    def _finish_first(self) -> None:
        """Waits for the oldest write. If that failed, this call and every later one raises its error."""
        self._writes[0].outcome.result()
        del self._writes[0]

    def _store(
        self, cursor: Cursor, copy: list[CheckpointState], meta: dict[str, Any], ready: torch.cuda.Event | None
    ) -> None:
        """Stores the checkpoint, then deletes old checkpoints."""
        state = copy.pop()
        if ready:  # once the copy is made, move it to the host in parallel with training, and free it
            with torch.cuda.stream(self.side_stream):
                ready.wait()
                state = self.host_memory.copy(state)
        self.checkpoints.write(cursor, self.attempt, state, meta, self._fence)
        self._fence()
        self.checkpoints.keep(self.num_kept, self.attempt)

    def _store_log(self, taken: Taken) -> None:
        self._fence()
        self.log.store(taken)

    def _fence(self) -> None:
        self.attempts.check(self.attempt)
