"""benchmarks/scaling.py with the fewest steps: that it measures what it says, not how fast it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_process import Job

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = (
    *("--only", "resnet50v2", "--rounds", "1", "--num-skipped", "1", "--num-steps", "2"),
    *("--image-size", "96", "--num-images", "30"),
)


def test_it_reads_the_phases_that_the_job_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from scaling import phases_in

    from cifar_dist.train.job import StartUp

    start_up = StartUp()
    start_up.end("worker imports")
    start_up.end("first step")
    start_up.phases["first step"] = 1.5
    assert phases_in(f"preflight\n{start_up}\nepoch 1") == {"worker imports": 0.0, "first step": 1.5}
    with pytest.raises(RuntimeError, match="did not say how it started"):
        phases_in("epoch 1")


def run(out: Path, *more: str) -> list[dict]:
    command = [sys.executable, BENCHMARKS / "scaling.py", *TINY, "--out", out, *more]
    env = {**os.environ, "RAY_ADDRESS": Job.address}
    done = subprocess.run(command, check=False, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return json.loads((out / "scaling.json").read_text())["results"]


def assert_ratio(result: dict) -> None:
    (rates,) = result["rounds"]
    first, second = rates.values()
    assert result["2 over 1"]["median"] == pytest.approx(second / first)


@pytest.mark.slow
def test_more_shards_are_measured(tmp_path: Path) -> None:
    (evaluation,) = run(tmp_path, "--parts", "evaluation")
    assert_ratio(evaluation)


@pytest.mark.slow
def test_more_workers_and_the_start_are_measured(tmp_path: Path) -> None:
    scaling, one, two = run(tmp_path, "--parts", "scaling", "start-up", "--global-batch-size", "4")
    assert_ratio(scaling)
    for num_workers, result in ((1, one), (2, two)):
        assert result["num_workers"] == num_workers
        seconds = {phase: stats["median"] for phase, stats in result["seconds"].items()}
        total, _ = seconds.pop("total"), seconds.pop("end")
        assert total == pytest.approx(sum(seconds.values()))
        assert list(seconds)[-2:] == ["set-up", "first step"]
