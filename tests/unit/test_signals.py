"""SIGTERM and Ctrl-C from a job's first moment: a sentence and an exit code, also while its imports take seconds."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from cifar_dist.launch import ray_private

ROOT = Path(__file__).parents[2]


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line for line in lines if line.startswith("SigCgt:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


WORDS = {
    "prepare": "--source shapes --out OUT",
    "train": "--recipe deck_fan --data OUT/data --storage OUT --name run",
    "evaluate": "--runs OUT/run --data OUT/data --out OUT",
    "pipeline": "--out OUT",
}


@pytest.mark.parametrize("job", WORDS)
@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, " by SIGTERM"), (signal.SIGINT, 130, "")])
def test_a_signal_during_the_imports_is_one_sentence(
    job: str, number: int, code: int, name: str, tmp_path: Path
) -> None:
    words = WORDS[job].replace("OUT", str(tmp_path / "out")).split()
    command = [sys.executable, ROOT / "jobs" / f"{job}.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while process.poll() is None and not catches(process.pid, signal.SIGTERM):
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == f"interrupted{name}; run the same command to go on from what is stored\n"


def test_ray_does_not_put_its_handler_in_the_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own would end the process with 15, without a word."""
    put = []
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", put.append)  # type: ignore[attr-defined]
    with ray_private.own_handlers():
        ray._private.utils.set_sigterm_handler("theirs")  # type: ignore[attr-defined]
    assert put == []
    ray._private.utils.set_sigterm_handler("another time")  # type: ignore[attr-defined]
    assert put == ["another time"]
