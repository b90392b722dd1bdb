"""The growth benchmark with a tiny data set: it finds its workers, their memory and the first step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth.py"


@pytest.mark.slow
def test_growth_is_measured_cold_and_warm(tmp_path: Path) -> None:
    sizes = ["--num-images", "60", "--scales", "2", "--rounds", "1", "--seconds", "0.1", "--folder", str(tmp_path)]
    command = [sys.executable, SCRIPT, *sizes, "--out", tmp_path / "out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "growth.json").read_text())["results"]
    assert [(r["scale"], r["num_images"], r["staging"]) for r in results["runs"]] == [
        (2, 120, "cold"),
        (2, 120, "warm"),
    ]
    for run in results["runs"]:
        assert 50 < run["anonymous_end_mib"] <= run["uss_end_mib"] + 1 < run["rss_end_mib"]
        assert run["anonymous_end_mib"] <= run["anonymous_peak_mib"] + 10  # it was looked at up to 10 ms later
        assert 0 < run["ready_seconds"] <= run["first_step_seconds"]
    assert "120 images, warm" in done.stdout
    assert os.listdir(tmp_path) == ["out"]
