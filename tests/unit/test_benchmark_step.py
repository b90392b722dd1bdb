"""The benchmark of a step's choices runs, tiny, and what it writes is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out: Path, *words: str) -> dict:
    command = [sys.executable, "benchmarks/step.py", "--rounds", "2", "--out", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "step.json").read_text())["results"]


@pytest.mark.slow
def test_every_way_of_the_base_and_of_dropout_is_measured(tmp_path: Path):
    words = ("--only", "base", "dropout", "--num-steps", "1", "--image-size", "96")
    results = run(tmp_path, *words)
    chunks = ["plain", "folded", *(f"chunks of {size}" for size in (4, 8, 16, 32))]
    ways = {"base, fp32": chunks, "base, bf16": chunks, "dropout, bf16": ["torch", "ours"]}
    assert {name: list(result["rates"]) for name, result in results.items()} == ways
    for name, result in results.items():
        ratios = result[f"over {ways[name][0]}"]
        assert ratios[ways[name][0]] == {"n": 2, "median": 1, "low": 1, "high": 1}
        assert all(rate["n"] == 2 and rate["low"] > 0 for rate in result["rates"].values())


def test_memory_is_given_back_in_one_way_only():
    """The C library reads its settings when a process starts: what a process of each way is started with."""
    code = "import os, sys; sys.path.insert(0, 'benchmarks'); import step; from cifar_dist.environment import "
    code += (
        "prepare_environment; prepare_environment(); step.bare_rate = lambda *_: sum('MALLOC' in n for n in os.environ)"
    )
    code += "; print(step.bare_rate(), step.without_kept_memory(None), step.bare_rate())"
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.split() == ["4", "0", "4"], done.stderr
