"""Runs the jobs as a user does: real processes, on real Ray clusters, that can be killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from cifar_dist.run.checkpoints import Checkpoints

ROOT = Path(__file__).parents[2]
# resnet50v2 with a frozen base is the lighter of the two networks to train and to store.
SMALL = (
    *("--recipe", "quickstart_resnet50v2", "--train-images", "40", "--global-batch-size", "10"),
    *("--validation-fraction", "0.3", "--log-every-steps", "1", "--epochs", "4"),
)


class Job:
    """jobs/SCRIPT as a process, from another folder than the project's; finds the processes that it brought forth."""

    started: ClassVar[list["Job"]] = []
    address: ClassVar[str] = ""  # of the cluster that all tests share, which saves each of them some ten seconds

    def __init__(self, script: str, *args: str, env: dict[str, str] | None = None, local: bool = False) -> None:
        """`local`: on a cluster of its own, as on a laptop, whose processes then are of this job's family."""
        self.tag = f"CIFAR_DIST_TEST={uuid.uuid4()}"
        Job.started.append(self)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the job has ended
        name, _, value = self.tag.partition("=")
        address = {"RAY_ADDRESS": "" if local else Job.address}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / script), *args],
            cwd=os.sep,
            # These tests mean CPUs, also on a machine with a GPU.
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **address, **(env or {}), name: value},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def output(self) -> str:
        """What it has said so far."""
        return os.pread(self.log.fileno(), 1 << 24, 0).decode()

    def family(self, name: str = "") -> list[int]:
        """Pids of this job's processes, Ray's among them, whose command line holds `name`."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if self.tag.encode() in environment and name.encode() in command:
                found.append(int(folder.name))
        return sorted(found)

    def kill(self, name: str = "") -> int:
        """SIGKILL to the family members of that name; returns how many there were."""
        pids = self.family(name)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def wait(self, timeout: float = 500) -> tuple[int, str]:
        """(exit code, stdout and stderr)."""
        try:
            code = self.process.wait(timeout)
        finally:
            self.kill()
        return code, self.output()

    def end(self) -> None:
        """Kills what is left of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.kill()


def run_job(script: str, *args: str, env: dict[str, str] | None = None, local: bool = False) -> tuple[int, str]:
    """(exit code, stdout and stderr) of jobs/SCRIPT."""
    return Job(script, *args, env=env, local=local).wait()


def run_command(command: list[str], env: dict[str, str], timeout: float = 500) -> tuple[int, str]:
    """(exit code, stdout and stderr) of a command in the project's folder."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=timeout, check=False, **output)  # type: ignore[call-overload]
    return done.returncode, done.stdout


def wait_until(condition: Callable[[], object], timeout: float = 240) -> None:
    """Polls; fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def read_metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def without_clock(lines: list[dict]) -> list[dict]:
    """The lines without what depends on the clock."""
    clock = {"images_per_second", "data_wait_share"}
    return [{k: v for k, v in line.items() if k not in clock and not k.endswith("seconds")} for line in lines]


def newest_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, verified, without the place in the log, whose lines tell the time."""
    checkpoints = Checkpoints(str(run))
    latest = checkpoints.latest()
    assert latest is not None
    return {name: value for name, value in vars(checkpoints.load(latest)).items() if name != "log"}


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit the same weights, average and optimizer state, and the same metrics without gaps or repeats."""
    assert without_clock(read_metrics(run)) == without_clock(read_metrics(other))
    torch.testing.assert_close(newest_state(run), newest_state(other), rtol=0, atol=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_args(data: str, storage: Path | str, name: str, workers: int = 2, *more: str) -> list[str]:
    where = ["train.py", "--data", data, "--storage", str(storage), "--name", name, "--workers", str(workers)]
    return [*where, *SMALL, "--checkpoint-every-steps", "3", *more]
