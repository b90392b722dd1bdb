"""The suite for one GPU, tiny and on the CPU: every section gives figures, and what is missing or fails is said."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cifar_dist import models

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"
TINY = [
    *("--device", "cpu", "--ways", "eager", "--rounds", "1", "--seconds", "0.01", "--matrix-sizes", "64"),
    *("--copy-mib", "1", "--fan-batches", "2", "--resnet-batch", "2", "--image-size", "96", "--decode-batch", "8"),
    *("--dali-threads", "1", "--feed-batch", "5", "--shapes", "20", "20", "--train-batch", "10", "--epochs", "1"),
]
WITHOUT = """import runpy, sys
for name in {names}:
    sys.modules[name] = None
runpy.run_path({script}, run_name="__main__")"""


def run_suite(out: Path, *args: str, without: tuple[str, ...] = ()) -> tuple[int, str, dict[str, Any]]:
    """(exit code, what it printed, the sections of the result file); `without` are packages that cannot be imported."""
    code = WITHOUT.format(names=without, script=repr(str(SCRIPT)))
    command = [sys.executable, "-c", code, *TINY, "--out", str(out), *args]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # several such threads wait for each other where tests run side by side
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    file = out / "gpu_suite.json"
    found = json.loads(file.read_text())["results"] if file.exists() else {}
    return done.returncode, done.stdout + done.stderr, found


def test_every_section_gives_figures(tmp_path: Path):
    code, printed, found = run_suite(tmp_path, without=("ray",))
    assert code == 0, printed
    results = {name: section["result"] for name, section in found.items()}
    assert results.keys() == {
        *("limits", "fan-2", "training", "resnet-forward", "resnet-finetuned", "resnet-frozen", "feed", "decode")
    }
    fan = results["fan-2"]
    assert fan["gflop_per_image"] == pytest.approx(
        5.97, rel=0.005
    )  # three times the forward's 0.996 GMAC, but for conv 1
    figures = fan["ways"]["eager"]
    assert figures["ms_per_step"]["median"] * figures["images_per_second"]["median"] == pytest.approx(2000)
    achieved = 2e9 * fan["gflop_per_image"] / figures["ms_per_step"]["median"] * 1000
    share = achieved / results["limits"]["flops_per_second"]
    assert figures["share_of_matrix_rate"]["median"] == pytest.approx(share)
    # the base's forward alone, the frozen base with its head, three passes through all
    work = [results[f"resnet-{kind}"]["gflop_per_image"] for kind in ("forward", "frozen", "finetuned")]
    assert work[0] < work[1] < 1.2 * work[0]
    assert 2.8 * work[0] < work[2] < 3.2 * work[0]
    assert set(results["feed"]["input_share"]) == {"decoded on the device", "loader, encoded", "loader, decoded"}
    assert set(results["decode"]["images_per_second"]) == {"DALI, CPU decoder", "decoded on the device"}
    assert results["training"]["num_train"] == 20
    assert len(results["training"]["epochs"]) == 1
    assert "fan 2, eager" in printed


def test_what_is_missing_is_said_and_left_out(tmp_path: Path):
    random = np.random.default_rng(0)
    arrays = {f"{s}_images": random.integers(0, 256, (20, 32, 32, 3), np.uint8) for s in ("train", "test")}
    arrays |= {f"{s}_labels": np.arange(20) % 10 for s in ("train", "test")}
    np.savez(tmp_path / "images.npz", **arrays)
    missing = ("ray", "nvidia.dali", "pyarrow", "filelock", "h5py", "safetensors")
    args = ["--data", str(tmp_path / "images.npz"), "--sections", "training", "feed", "decode"]
    code, printed, found = run_suite(tmp_path, *args, without=missing)
    assert code == 0, printed
    assert found["training"]["result"]["data"] == "images.npz"
    assert found["feed"]["result"]["note"] == "without the loader: it needs nvidia.dali, which is not installed"
    assert found["decode"]["skipped"] == "it needs nvidia.dali, which is not installed"


def test_a_section_that_fails_does_not_stop_the_others(tmp_path: Path):
    code, printed, found = run_suite(tmp_path, "--matrix-sizes", "-1", "--sections", "limits", "decode")
    assert code == 1
    assert found["limits"]["error"].startswith("RuntimeError")
    assert "result" in found["decode"]
    assert printed.splitlines()[-1].startswith("error: these sections failed, see above: limits (RuntimeError")


def test_no_section_begins_when_no_time_is_left(tmp_path: Path):
    code, _, found = run_suite(tmp_path, "--minutes", "0", "--sections", "limits")
    assert code == 0
    assert found["limits"]["skipped"] == "0 s were left"


def test_without_a_gpu_it_says_so(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, printed, _ = run_suite(tmp_path, "--device", "cuda")
    assert code == 1
    assert "error: PyTorch sees no GPU here; --device cpu" in printed


@pytest.mark.parametrize(("name", "size"), [("fan", 32), ("resnet50v2", 96)])
def test_the_networks_compile_as_one_graph(name: str, size: int):
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
