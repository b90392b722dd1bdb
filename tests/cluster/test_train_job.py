"""jobs/train.py on a real Ray cluster: what a run leaves behind, continuing it, killing it, stopping it."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import ray
from job_process import read_metrics, run_job, train_args
from safetensors.torch import load_file

from cifar_dist.data import sources, store
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.launch import plan
from cifar_dist.recipes import recipe_config
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.checkpoints import Checkpoints

# 40 images in batches of 10, four epochs; 18 of the 60 images validate.
NUM_STEPS = 16


def steps_logged(run: Path) -> list[int]:
    return [line["global_step"] for line in read_metrics(run) if line["kind"] == "step"]


def test_a_run_leaves_what_the_design_says(whole_run: tuple[Path, str]) -> None:
    run, output = whole_run
    assert "RANDOM weights" in output
    assert "epoch 4/4 done" in output
    assert re.search(r"first step after [\d.]+ s: .*worker processes [\d.]+, .*set-up [\d.]+", output)
    assert re.search(r"(input|communication|compute)-bound: [\d.]+% computing, [\d.]+% waiting for input", output)
    assert steps_logged(run) == list(range(1, NUM_STEPS + 1))
    epochs = [line for line in read_metrics(run) if line["kind"] == "epoch"]
    assert [e["num_validation"] for e in epochs] == [20] * 4
    for epoch in epochs:
        assert epoch["validation_accuracy"] == epoch["num_validation_correct"] / 20
        assert epoch["images_per_second"] > 0
        assert 0 <= epoch["data_wait_share"] < 1
        assert 0 < epoch["communication_seconds"] < epoch["seconds"]
    checkpoints = Checkpoints(str(run))
    assert [c.cursor for c in checkpoints.all()][-1] == Cursor(4, 0)
    best = checkpoints.best()
    assert best is not None
    assert best.meta["metrics"]["validation_accuracy"] == max(e["validation_accuracy"] for e in epochs)
    assert json.loads((run / "config.json").read_text())["config"] == best.meta["config"]
    assert best.meta["world_size"] == 2
    assert any((run / "tensorboard").iterdir())


def test_a_finished_run_says_so_and_does_nothing(whole_run: tuple[Path, str], tiny_uri: str) -> None:
    run, _ = whole_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, output = run_job(*train_args(tiny_uri, run.parent, "whole"))
    assert code == 0
    assert "run whole is finished already" in output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_other_settings_are_refused_for_a_stored_run(whole_run: tuple[Path, str], tiny_uri: str) -> None:
    run, _ = whole_run
    code, output = run_job(*train_args(tiny_uri, run.parent, "whole", 2, "--learning-rate", "0.5"))
    assert code == 1
    assert "the run whole was started with learning_rate=0.001, not 0.5" in output
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_the_run_at_once(tiny_uri: str, tmp_path: Path) -> None:
    more = ["--learning-rate", "1e30", "--optimizer", "sgd", "--checkpoint-every-steps", "1"]
    code, output = run_job(*train_args(tiny_uri, tmp_path, "run", 1, *more))
    assert code == 1
    assert "not a number" in output
    assert "Lower --learning-rate" in output
    assert "Traceback" not in output
    for checkpoint in Checkpoints(str(tmp_path / "run")).all():
        state = load_file(tmp_path / "run" / "checkpoints" / checkpoint.name / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize(
    ("where", "settings", "message"),
    [
        ({"workers": 0}, {}, "--workers must be 1 or more"),
        ({"name": "../up"}, {}, "is no run name"),
        ({"name": "a/b"}, {}, "is no run name"),
        ({"data": "/nowhere"}, {}, "is no data set"),
        ({"storage": "s3://key:secret@bucket/x"}, {}, "holds credentials"),
        ({}, {"global_batch_size": 1}, "less than one image for each of 2 workers"),
        ({}, {"train_images": 1000}, "the data set has 60 train images"),
    ],
)
def test_what_cannot_work_is_said_before_a_cluster_is_started(
    where: dict, settings: dict, message: str, tiny_uri: str, tmp_path: Path
) -> None:
    given = {"data": tiny_uri, "storage": str(tmp_path), "name": "run", "workers": 2, **where}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        plan.make_plan(recipe_config("quickstart_fan", **settings), Launch(recipe="quickstart_fan", **given))
    assert "secret" not in str(error.value)
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    """One train image per class: none is left for validation."""
    images = [sources.Item(f"{i}.png", i, partial(sources.draw_shape, i, (i,))) for i in range(3)]
    source = sources.Source.of("drawn", ["a", "b", "c"], {"train": images, "test": images})
    store.prepare(source, str(tmp_path / "data"))
    where = Launch(data=str(tmp_path / "data"), storage=str(tmp_path), name="run", recipe="quickstart_fan")
    with pytest.raises(UserError, match="2 train images that a validation split needs"):
        plan.make_plan(recipe_config("quickstart_fan"), where)
