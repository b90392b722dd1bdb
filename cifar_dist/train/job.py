"""The plan of a run, and the job that the driver hands to every worker."""

import time
from dataclasses import dataclass, field
from typing import Any

from cifar_dist.config import Config
from cifar_dist.data.staged import DataSet
from cifar_dist.job_settings import Launch
from cifar_dist.run.folder import Run


@dataclass
class StartUp:
    """The seconds of each phase from a job's start to its first step. The driver passes the object to the workers."""

    at: float = field(default_factory=time.time)  # end of the last phase, Unix seconds
    phases: dict[str, float] = field(default_factory=dict)

    def end(self, phase: str) -> None:
        now = time.time()
        self.at, self.phases[phase] = now, now - self.at

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"first step after {sum(self.phases.values()):.1f} s: {parts}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run whose settings were checked. `weights`: facts about the --weights file; `card`: the run's config.json."""

    config: Config
    launch: Launch
    run: Run
    data: DataSet
    weights: dict[str, Any] | None
    card: dict[str, Any]
    is_finished: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of every worker. `progress` is the handle of a Ray actor (launch/progress.py).

    `driver` and `attempt` are the driver's claim on the run (run/ownership.py). `limit_seconds` limits every wait of
    one rank for another.
    """

    plan: Plan
    driver: str
    attempt: int
    progress: Any
    start_up: StartUp
    num_cpus_per_worker: int
    git_commit: str
    limit_seconds: int
