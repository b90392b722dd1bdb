"""The benchmarks that run the whole job, with the fewest steps: that they measure what they say, not how fast it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from job_process import Job

from cifar_dist import models
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import Head
from cifar_dist.recipes import recipe_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = (
    *("--only", "resnet50v2", "--rounds", "1", "--num-skipped", "1", "--num-steps", "2"),
    *("--image-size", "96", "--global-batch-size", "4"),
)


def run(script: str, out: Path, *more: str) -> list[dict]:
    command = [sys.executable, BENCHMARKS / script, *TINY, "--out", out, *more]
    env = {**os.environ, "RAY_ADDRESS": Job.address}
    done = subprocess.run(command, check=False, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return json.loads((out / script).with_suffix(".json").read_text())["results"]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
def test_the_steady_rate_leaves_the_first_steps_out() -> None:
    from job import steady_rate

    lines = [{"kind": "step", "epoch": 0, "step": s, "seconds": t} for s, t in ((2, 100.0), (4, 101.0), (6, 103.0))]
    lines.append({"kind": "epoch", "epoch": 0, "seconds": 500.0})
    lines.append({"kind": "step", "epoch": 1, "step": 6, "seconds": 1.0})
    assert steady_rate(lines, 2, 4, 30) == pytest.approx(4 * 30 / 3)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("name", models.MODELS)
def test_the_plain_network_is_the_same_network(name: str) -> None:
    """The same weights by shape and the same number of them is trained."""
    from peers import PLAIN

    ours, plain = models.build(name), PLAIN[name](10)

    def shapes(model: torch.nn.Module, trained: bool) -> list[tuple[int, ...]]:
        return sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad == trained)

    for trained in (True, False):
        assert shapes(plain, trained) == shapes(ours, trained)

    def kinds(model: torch.nn.Module) -> list[str]:
        """Of the layers in their order, but for those that do nothing and how Dense's input is flattened."""
        leaves = [m for m in model.modules() if not any(m.children()) and getattr(m, "p", 1)]
        names = {"KerasBatchNorm": "BatchNorm2d", "BatchNorm1d": "BatchNorm2d", "GlobalAveragePooling": "pool"}
        kinds = [names.get(type(m).__name__, type(m).__name__) for m in leaves]
        return [kind.replace("AdaptiveAvgPool2d", "pool") for kind in kinds if kind != "Flatten"]

    heads = (plain[1], Head(ours)) if name == "resnet50v2" else (plain, ours)
    assert kinds(heads[0]) == kinds(heads[1])


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(("recipe", "flipped"), [("deck_fan", False), ("deck_resnet50v2", True)])
def test_the_plain_network_s_images_are_flipped_as_the_deck_s(recipe: str, flipped: bool, tiny_uri: str) -> None:
    from peers import Images

    steps = [type(step).__name__ for step in Images(tiny_uri, recipe_config(recipe).data).transform.transforms]
    flips = [name for name in steps if "Flip" in name]
    assert flips == (["RandomHorizontalFlip", "RandomVerticalFlip"] if flipped else [])


@pytest.mark.usefixtures("benchmarks")
def test_the_epoch_from_which_the_cache_pays() -> None:
    from features import first_cheaper

    assert first_cheaper([10, 10, 10], [12, 9, 8]) == 3
    assert first_cheaper([10, 10], [9, 12]) == 1
    assert first_cheaper([10, 10], [11, 9.5]) is None


@pytest.mark.slow
def test_cached_features_are_measured_beside_computed_ones(tiny_uri: str, tmp_path: Path) -> None:
    script = [sys.executable, BENCHMARKS / "features.py", "--data", tiny_uri, "--out", tmp_path, "--rounds", "1"]
    few = ["--num-epochs", "2", "--num-images", "20", "--image-size", "96", "--global-batch-size", "10"]
    done = subprocess.run([*script, *few, "--validation-fraction", "0.3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "features.json").read_text())["results"]
    assert [set(epoch) for epoch in results["epochs"]] == [{"computed", "cached"}] * 2
    assert all(seconds > 0 for epoch in results["epochs"] for way in epoch.values() for seconds in way)


@pytest.mark.slow
def test_the_job_is_measured_beside_a_bare_loop_of_as_many_workers(tiny_uri: str, tmp_path: Path) -> None:
    (result,) = run("job.py", tmp_path, "--data", tiny_uri, "--workers", "2")
    assert (result["num_workers"], result["batch_size"]) == (2, 4)
    (rates,) = result["rounds"]
    assert result["job_over_bare"]["median"] == pytest.approx(rates["job"] / rates["bare"])


@pytest.mark.slow
def test_the_job_is_measured_beside_its_peers(tiny_uri: str, tmp_path: Path) -> None:
    results = run("peers.py", tmp_path, "--data", tiny_uri, "--ways", "PyTorch")
    assert [r["way"] for r in results] == ["job", "PyTorch"]
    job, plain = (r["images_per_second"]["median"] for r in results)
    assert results[1]["job over it"]["median"] == pytest.approx(job / plain)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.slow
def test_keras_is_measured(tiny_uri: str, tmp_path: Path) -> None:
    from peers import keras_command

    try:
        keras_command()
    except UserError as error:
        pytest.fail(str(error)) if os.environ.get("CI") else pytest.skip(str(error))
    results = run("peers.py", tmp_path, "--data", tiny_uri, "--ways", "Keras")
    assert results[1]["way"] == "Keras"
    assert results[1]["images_per_second"]["median"] > 0
