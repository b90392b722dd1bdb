"""A data set's own validation split on a real cluster: it validates and is evaluated, also in a run that is resumed."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from job_process import assert_same_run, read_metrics, run_job, train_args
from validation_data import own_validation

from cifar_dist.run.checkpoints import Checkpoints

LABELS = [0, 1, 2] * 5  # seven classes have no image


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return own_validation(tmp_path_factory.mktemp("own") / "data", LABELS, num_train=50)


@pytest.fixture(scope="module")
def run(uri: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, output) of two epochs by two workers."""
    storage = tmp_path_factory.mktemp("runs")
    more = ["--train-images", "0", "--precision", "fp32", "--epochs", "2"]
    code, output = run_job(*train_args(uri, storage, "whole", 2, *more))
    assert code == 0, output
    return storage / "whole", output


def test_all_of_train_trains_and_the_split_validates(run: tuple[Path, str]) -> None:
    folder, output = run
    source = "the data set's own split (15 images)"
    assert f"WARNING: --validation-fraction will have no effect: the validation images are {source}" in output
    assert "on 50 images, validating on 15: " in output
    assert f"validation images: {source}" in output
    lines = read_metrics(folder)
    assert [line["num_validation"] for line in lines if line["kind"] == "epoch"] == [15, 15]
    assert len([line for line in lines if line["kind"] == "step"]) == 2 * 5
    latest = Checkpoints(str(folder)).latest()
    assert latest is not None
    assert latest.meta["num_train"] == 50


def test_evaluation_finds_what_validation_found(run: tuple[Path, str], uri: str, tmp_path: Path) -> None:
    folder, _ = run
    args = ("--runs", str(folder), "--data", uri, "--out", str(tmp_path), "--shards", "2")
    code, output = run_job("evaluate.py", *args)
    assert code == 0, output
    found = json.loads((tmp_path / "report.json").read_text())["runs"][0]
    validation, best = found["splits"]["validation"], Checkpoints(str(folder)).best()
    assert best is not None
    assert {split: values["num_images"] for split, values in found["splits"].items()} == {
        **{"train": 50, "validation": 15, "test": 20}
    }
    metrics = best.meta["metrics"]
    assert validation["num_correct"] == metrics["num_validation_correct"]
    assert validation["loss"] == pytest.approx(metrics["validation_loss"], rel=1e-4)
    table = pq.read_table(tmp_path / "predictions" / "whole-validation.parquet")
    assert table["id"].to_pylist() == list(range(15))
    assert table["label"].to_pylist() == LABELS
    assert np.sum(validation["counts"]["confusion"], axis=1).tolist() == [5, 5, 5, *[0] * 7]


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_same_bits(run: tuple[Path, str], uri: str, tmp_path: Path) -> None:
    for epochs in ("1", "2"):
        more = ["--train-images", "0", "--precision", "fp32", "--epochs", epochs]
        code, output = run_job(*train_args(uri, tmp_path, "again", 2, *more))
        assert code == 0, output
    assert "continuing from" in output
    assert_same_run(tmp_path / "again", run[0])
