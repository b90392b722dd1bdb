"""What the driver hands to every worker."""

import time
from dataclasses import dataclass, field
from typing import Any

from cifar_dist.config import Config, Launch
from cifar_dist.data.manifest import Manifest


@dataclass
class StartUp:
    """Seconds from a job's start to its first step, phase by phase; it travels from the driver to the workers."""

    at: float = field(default_factory=time.time)  # the end of the last phase
    phases: dict[str, float] = field(default_factory=dict)

    def end(self, phase: str) -> None:
        now = time.time()
        self.at, self.phases[phase] = now, now - self.at

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.phases.items())
        return f"first step after {sum(self.phases.values()):.1f} s: {parts}"


@dataclass(frozen=True)
class Plan:
    """A run that was found sound. `weights`: the card of --weights; `card`: what config.json is to hold."""

    config: Config
    launch: Launch
    data_uri: str
    manifest: Manifest
    weights: dict[str, Any] | None
    card: dict[str, Any]
    is_finished: bool


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker. `progress` is a Ray actor handle, `weights` the card of --weights.

    `driver` and `attempt` are the driver's claim on the run (run/ownership.py).
    """

    config: Config
    data_uri: str
    manifest_sha256: str
    run_uri: str
    staging_folder: str | None
    num_cpus_per_worker: int
    git_commit: str
    progress: Any
    driver: str
    attempt: int
    weights: dict[str, Any] | None
    start_up: StartUp
    profile: bool = False
    limit_seconds: float = 120.0  # of every wait of a rank for another
