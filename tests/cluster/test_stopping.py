"""A job that is asked to end or loses a part of Ray: a checkpoint, a sentence, an exit code, nothing left running."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from job_process import Job, train_args, wait_until

from cifar_dist.run.checkpoints import Checkpoints

LONG = ("--epochs", "1000", "--checkpoint-every-steps", "0", "--checkpoint-every-seconds", "0")
GO_ON = "run the same command to go on from what is stored"


def started(*args: str, until: str) -> Job:
    """A job on a cluster of its own that has said `until`."""
    job = Job(*args, local=True)

    def has_said() -> bool:
        assert job.process.poll() is None, job.wait()
        return until in job.output()

    wait_until(has_said)
    return job


def ended(job: Job, seconds: float = 60) -> tuple[int, str]:
    """(exit code, output) of a job that ends by itself and leaves nothing running."""
    code = job.process.wait(seconds)
    end = time.monotonic() + 20
    while left := job.family():
        assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.1)
    output = job.output()
    assert "Traceback" not in output
    assert "***" not in output  # a native stack
    return code, output


def test_sigterm_and_ctrl_c_store_a_checkpoint_and_leave_nothing(tiny_uri: str, tmp_path: Path) -> None:
    args = train_args(tiny_uri, tmp_path, "run", 2, *LONG)
    job = started(*args, until="first step after")
    job.process.terminate()
    code, output = ended(job)
    assert code == 143
    assert output.count("stopping: a checkpoint is being stored; a second signal ends at once") == 1
    assert output.splitlines()[-1] == f"interrupted by SIGTERM; {GO_ON}"
    stored = Checkpoints(str(tmp_path / "run")).latest()
    assert stored is not None
    job = started(*args, until=f"continuing from {stored.name}")
    wait_until(lambda: "first step after" in job.output())
    os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
    code, output = ended(job)
    assert code == 130
    assert output.splitlines()[-1] == f"interrupted; {GO_ON}"
    assert "RANDOM weights" not in output  # it goes on from a checkpoint
    latest = Checkpoints(str(tmp_path / "run")).latest()
    assert latest is not None
    assert latest.meta["global_step"] > stored.meta["global_step"]


@pytest.mark.slow
def test_all_processes_may_get_sigterm_at_once(tiny_uri: str, tmp_path: Path) -> None:
    """As from systemd and Slurm."""
    job = started(*train_args(tiny_uri, tmp_path, "run", 2, *LONG), until="first step after")
    for pid in job.family():
        os.kill(pid, signal.SIGTERM)
    code, output = ended(job)
    assert (code, output.splitlines()[-1]) == (143, f"interrupted by SIGTERM; {GO_ON}")
    assert Checkpoints(str(tmp_path / "run")).latest()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["preflight: ", "training resnet50v2"])
def test_a_job_that_has_nothing_to_store_ends_at_once(tiny_uri: str, tmp_path: Path, moment: str) -> None:
    job = started(*train_args(tiny_uri, tmp_path, "run", 2, *LONG), until=moment)
    job.process.terminate()
    code, output = ended(job)
    assert (code, output.splitlines()[-1]) == (143, f"interrupted by SIGTERM; {GO_ON}")


@pytest.mark.slow
def test_a_second_signal_ends_the_job_at_once(tiny_uri: str, tmp_path: Path) -> None:
    job = started(*train_args(tiny_uri, tmp_path, "run", 2, *LONG), until="first step after")
    workers = job.family("RayTrainWorker")
    for pid in workers:  # they will store nothing
        os.kill(pid, signal.SIGSTOP)
    job.process.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        ended_within(job, 2)
    job.process.send_signal(signal.SIGINT)
    ended_within(job, 2)
    assert job.process.returncode == 130
    wait_until(lambda: not job.family(), 20)


def ended_within(job: Job, seconds: float) -> None:
    try:
        job.process.wait(seconds)
    except Exception as error:
        raise TimeoutError from error


@pytest.mark.slow
def test_an_evaluation_can_be_interrupted(whole_run: tuple[Path, str], tiny_uri: str, tmp_path: Path) -> None:
    args = ("evaluate.py", "--runs", str(whole_run[0]), "--data", tiny_uri, "--out", str(tmp_path / "out"))
    job = started(*args, "--shards", "8", until="1 of 8 shards done")
    job.process.terminate()
    code, output = ended(job)
    assert (code, output.splitlines()[-1]) == (143, f"interrupted by SIGTERM; {GO_ON}")
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "said"), [("TrainController", "controller of run run died"), ("raylet", "Ray")])
def test_the_death_of_a_part_of_ray_is_said_as_what_it_is(tiny_uri: str, tmp_path: Path, part: str, said: str) -> None:
    job = started(*train_args(tiny_uri, tmp_path, "run", 2, *LONG), until="first step after")
    wait_until(lambda: Checkpoints(str(tmp_path / "run")).latest())
    assert job.kill(part)
    code, output = ended(job, 120)
    assert code == 1, output
    assert re.search(rf"error: .*{said}.*run the same command to go on", output, re.IGNORECASE), output
    assert "failed more than" not in output
