"""The suite and the smoke test for one GPU, tiny and on the CPU: every section gives figures, and a failure is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist import models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = [
    *("--device", "cpu", "--rounds", "1", "--num-steps", "2", "--seconds", "0.01", "--matrix-sizes", "64"),
    *("--copy-mib", "1", "--fan-batches", "4", "--resnet-batch", "4", "--image-size", "96", "--input-batch", "8"),
    *("--eval-batches", "4", "--eval-images", "8", "--shapes", "40", "20"),
]


def run_script(name: str, *args: str) -> tuple[int, str]:
    """(exit code, what it printed)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # more threads wait for each other where tests run side by side
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *args], capture_output=True, text=True, check=False, env=env
    )
    return done.returncode, done.stdout + done.stderr


def run_suite(out: Path, *args: str) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what it printed, the sections of the result file)."""
    code, printed = run_script("gpu_suite.py", *TINY, "--out", str(out), *args)
    file = out / "gpu_suite.json"
    return code, printed, json.loads(file.read_text())["results"] if file.exists() else {}


def test_every_section_gives_figures(tmp_path: Path) -> None:
    code, printed, found = run_suite(tmp_path)
    assert code == 0, printed
    results = {name: section["result"] for name, section in found.items()}
    assert results.keys() == {
        *("limits", "fan-4", "resnet50v2-frozen", "resnet50v2-finetuned"),
        *("input", "ranks", "checkpoint", "evaluation"),
    }
    for name in ("fan-4", "resnet50v2-frozen", "resnet50v2-finetuned"):
        rates = {way: rate["median"] for way, rate in results[name]["images_per_second"].items()}
        assert set(rates) == {"train_epoch", "floor"}
        assert results[name]["ratio"]["train_epoch"]["median"] == pytest.approx(rates["train_epoch"] / rates["floor"])
    assert set(results["input"]["images_per_second"]) == {"decoded", "encoded"}
    assert set(results["ranks"]["ratio"]) == {"DistributedDataParallel"}
    seconds = results["checkpoint"]["seconds"]
    assert 0 < seconds["stall"]["median"] <= seconds["stored"]["median"]
    assert set(results["evaluation"]["deck_fan"]["images_per_second"]) == {"fp32, 4", "bf16, 4"}
    assert "deck_fan 4: train_epoch" in printed


def test_a_section_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    code, printed, found = run_suite(tmp_path, "--matrix-sizes", "-1", "--sections", "limits", "input")
    assert code == 1
    assert found["limits"]["error"].startswith("RuntimeError")
    assert "result" in found["input"]
    assert printed.splitlines()[-1].startswith("error: these sections failed, see above: limits (RuntimeError")


def test_no_section_begins_when_no_time_is_left(tmp_path: Path) -> None:
    code, _, found = run_suite(tmp_path, "--minutes", "0", "--sections", "limits")
    assert code == 0
    assert found["limits"]["skipped"] == "0 s were left"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, printed, _ = run_suite(tmp_path, "--device", "cuda")
    assert code == 1
    assert "error: PyTorch sees no GPU here; --device cpu" in printed


def test_the_smoke_test_passes_here() -> None:
    """All but its whole job, which tests/cluster has."""
    parts = ("steps", "graphs", "state", "starts", "log", "ranks", "pixels")
    code, printed = run_script("gpu_smoke.py", "--device", "cpu", "--parts", *parts)
    assert code == 0, printed
    assert printed.count("ok   graphs: ") == 11
    assert "everything works" in printed.splitlines()


@pytest.mark.parametrize(("name", "size"), [("fan", 32), ("resnet50v2", 96)])
def test_the_networks_compile_as_one_graph(name: str, size: int) -> None:
    """Without a break, training's updates of BatchNorm included, and to the same values."""
    model, same = (models.build(name).train() for _ in range(2))
    for module in (*model.modules(), *same.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a compiled graph draws other masks
    images, results = torch.rand(2, 3, size, size), []
    for network in (model, torch.compile(same, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        logits = network(images)
        logits.sum().backward()
        results.append(logits.detach())
    torch.testing.assert_close(*results)
    for (key, one), other in zip(model.named_buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=key)
