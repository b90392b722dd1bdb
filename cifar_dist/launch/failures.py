"""Handles failures of workers: another start, or the end of the run with a one-sentence reason."""

import contextlib
import math
import time
from typing import Any

import ray
from ray.train import UserCallback

from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.launch.ray_private import look_for_nodes

QUICK_SECONDS = 30.0  # a failure this soon after another failure delays the next start
RETRY_SECONDS, MOST_RETRY_SECONDS = 5.0, 30.0  # first delay, which doubles with each failure, and longest delay


class StopOnUserError(UserCallback):
    """Runs in Ray Train's controller when workers have failed. `progress` is the job's actor."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.num_quick = 0  # consecutive failures within QUICK_SECONDS of each other, with nothing logged in between
        self.num_updates, self.failed_at = 0, -math.inf

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Ends the run at a UserError, which a retry would raise again. Delays the retry after repeated failures."""
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise error
        has_moved, is_soon = self.has_moved(), time.monotonic() - self.failed_at < QUICK_SECONDS
        self.num_quick = self.num_quick + 1 if is_soon and not has_moved else 0
        if self.num_quick:  # other processes may free what is short, such as memory
            time.sleep(min(RETRY_SECONDS * 2 ** (self.num_quick - 1), MOST_RETRY_SECONDS))
        self.failed_at = time.monotonic()
        look_for_nodes()

    def has_moved(self) -> bool:
        """Whether a step or an epoch was logged since the last failure."""
        before = self.num_updates
        with contextlib.suppress(ray.exceptions.RayError):
            self.num_updates = ray.get(self.progress.updates.remote(), timeout=5)
        return self.num_updates > before


def why_failed(error: Exception, launch: Launch) -> str:
    """Returns a sentence that explains why Ray Train gave up the run."""
    cause, kept = getattr(error, "controller_failure", None), "what was stored is kept, run the same command to go on"
    if isinstance(cause, UserError):
        return str(cause)
    name, reason = launch.name, first_cause(cause or error)
    if isinstance(error, ray.exceptions.RayActorError):
        return f"Ray Train's controller of run {name} died, on the node of this job: {reason}; {kept}"
    if failures := getattr(error, "worker_failures", None):
        texts = [f"{type(failure).__name__} {failure}" for failure in failures.values()]
        memory = any("OutOfMemoryError" in text or "low on memory" in text for text in texts)
        advice = "; the machine is out of memory: use fewer --workers or a smaller --global-batch-size" * memory
        return f"the workers of run {name} failed more than {launch.max_failures} times: {reason}{advice}; {kept}"
    return f"Ray could not go on with run {name}: {reason}; is the cluster alive? {kept[0].upper()}{kept[1:]}"


def first_cause(error: Exception) -> str:
    """Returns the last line of the error of the lowest failed rank, or of `error` itself."""
    failures = getattr(error, "worker_failures", None)
    rank, cause = min(failures.items()) if failures else (None, error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = lines[-1] if lines else type(cause).__name__
    return text if rank is None else f"rank {rank}: {text}"
