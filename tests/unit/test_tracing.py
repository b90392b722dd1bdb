"""The trace of a few steps, by torch's real profiler."""

import gzip
import json

import pytest
import torch

from cifar_dist.run.folder import Run
from cifar_dist.train.tracing import NUM_RECORDED, NUM_SKIPPED, NUM_WARM_UP, Tracer

NEEDED = NUM_SKIPPED + NUM_WARM_UP + NUM_RECORDED


def traced(folder, num_steps: int) -> list[str]:
    said: list[str] = []
    tracer = Tracer(Run(str(folder)), said.append)
    tracer.start()
    for step in range(num_steps):
        torch.ones(3).square_()
        tracer.step(step + 1)
    tracer.stop()
    return said


@pytest.mark.parametrize("num_more", [0, 3])
def test_a_trace_of_the_recorded_steps_is_stored(tmp_path, num_more):
    (said,) = traced(tmp_path, NEEDED + num_more)
    name = f"profile/rank-0-step-{NEEDED:06d}.json.gz"
    assert said == f"profile of {NUM_RECORDED} steps: {name}, for chrome://tracing or ui.perfetto.dev"
    events = json.loads(gzip.decompress((tmp_path / name).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::square_" for event in events) == NUM_RECORDED


def test_a_run_that_ends_early_has_a_trace_of_fewer_steps(tmp_path):
    (said,) = traced(tmp_path, NEEDED - 2)
    assert said.startswith(f"profile of {NUM_RECORDED - 2} steps: ")


@pytest.mark.parametrize("num_steps", [1, NUM_SKIPPED + NUM_WARM_UP])
def test_a_run_that_is_too_short_says_so(tmp_path, num_steps):
    least = NUM_SKIPPED + NUM_WARM_UP + 1
    assert traced(tmp_path, num_steps) == [f"WARNING: --profile wrote nothing: the run had fewer than {least} steps"]
    assert not list(tmp_path.rglob("*.gz"))
