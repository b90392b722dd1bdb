"""Through the job: Keras weights as an input, a frozen base that stays frozen, and the deck's "10% val_accuracy"."""

import gzip
import hashlib
import json
from pathlib import Path

import h5py
import pytest
import torch
from job_process import read_metrics, run_job, train_args
from safetensors.torch import load_file

from cifar_dist import models
from cifar_dist.data import sources, store
from cifar_dist.models.keras_weights import base_layers, tensors_of
from cifar_dist.run.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet50V2 base in the layout in which Keras publishes it."""
    path = tmp_path_factory.mktemp("weights") / "base.h5"
    with h5py.File(path, "w") as file:
        for name, module in base_layers(models.build("resnet50v2", seed=9).base).items():
            for variable, tensor in tensors_of(module).items():
                value = tensor.detach().numpy()
                file[f"{name}/{name}/{variable}:0"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return path


def last_checkpoint(run: Path) -> Path:
    latest = Checkpoints(str(run)).latest()
    assert latest is not None
    return run / "checkpoints" / latest.name


def test_a_frozen_base_keeps_the_weights_it_was_given(tiny_uri: str, base_file: Path, tmp_path: Path) -> None:
    more = ("--features", "cached", "--staging-folder", str(tmp_path / "staged"), "--profile")
    words = train_args(tiny_uri, tmp_path, "weighted", 2, "--weights", str(base_file), *more)
    code, output = run_job(*words)
    assert code == 0, output
    assert "cached features: " in output
    (cache,) = (tmp_path / "staged").rglob("features-*.bin")
    assert 0 < cache.stat().st_blocks * 512 < cache.stat().st_size  # what came up, not every variant of every image
    (trace,) = (tmp_path / "weighted" / "profile").iterdir()
    assert "aten::convolution_backward" in gzip.decompress(trace.read_bytes()).decode()
    assert "RANDOM" not in output
    assert "base.h5, which is not the published file of ImageNet weights" in output
    folder = last_checkpoint(tmp_path / "weighted")
    trained, given = load_file(folder / "model.safetensors"), models.build("resnet50v2", seed=9).base.state_dict()
    assert all(torch.equal(trained[f"base.{name}"], tensor) for name, tensor in given.items())
    start = models.build("resnet50v2", seed=0).state_dict()
    assert not torch.equal(trained["conv.weight"], start["conv.weight"])
    (adam,) = torch.load(folder / "optimizer.pt", weights_only=True)["optimizers"]
    num_trained = sum(p.requires_grad for p in models.build("resnet50v2").parameters())
    assert len(adam["state"]) == num_trained < 30
    sha256 = hashlib.sha256(base_file.read_bytes()).hexdigest()
    card = {"uri": str(base_file), "sha256": sha256, "is_imagenet": False}
    assert json.loads((folder / "meta.json").read_text())["weights"] == card
    assert json.loads((tmp_path / "weighted" / "config.json").read_text())["weights"] == card

    code, output = run_job(*train_args(tiny_uri, tmp_path, "weighted", 2, "--epochs", "3"))
    assert code == 1
    assert "was started from" in output
    moved = base_file.rename(base_file.with_name("moved.h5"))
    code, output = run_job(*train_args(tiny_uri, tmp_path, "weighted", 2, "--weights", str(moved), "--epochs", "3"))
    moved.rename(base_file)
    assert code == 0, output


def test_weights_that_do_not_fit_leave_nothing_behind(tiny_uri: str, base_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.h5"
    file.write_bytes(base_file.read_bytes())
    with h5py.File(file, "a") as opened:
        del opened["conv5_block1_0_conv"]
    code, output = run_job(*train_args(tiny_uri, tmp_path, "short", 2, "--weights", str(file)))
    assert code == 1
    assert "short.h5 lacks the layer conv5_block1_0_conv" in output
    assert "Traceback" not in output
    assert not (tmp_path / "short").exists()
    code, output = run_job(*train_args(tiny_uri, tmp_path, "none", 2, "--weights", str(tmp_path / "none.h5")))
    assert code == 1
    assert f"there is no file {tmp_path}/none.h5" in output


@pytest.mark.slow
def test_the_decks_ten_percent(tmp_path: Path) -> None:
    """Momentum 0.99: validation near chance, the same weights far better with batch statistics; the job says so."""
    store.prepare(sources.shapes(num_train=600, num_test=20), str(tmp_path / "data"))
    words = ["--recipe", "quickstart_fan", "--batchnorm-momentum", "0.99", "--data", str(tmp_path / "data")]
    words += ["--storage", str(tmp_path), "--name", "lag", "--workers", "1", "--epochs", "1", "--precision", "fp32"]
    code, output = run_job("train.py", *words, local=True)
    assert code == 0, output
    (epoch,) = [line for line in read_metrics(tmp_path / "lag") if line["kind"] == "epoch"]
    assert epoch["train_accuracy"] > 0.3  # the mean over the epoch
    assert epoch["validation_accuracy"] < 0.2
    (warning,) = [line for line in read_metrics(tmp_path / "lag") if line["kind"] == "warning"]
    assert warning["warning"] == "validation_near_chance"
    assert warning["recalibrated_accuracy"] > epoch["validation_accuracy"] + 0.2
    assert "the moving statistics lag behind the weights (momentum 0.99)" in warning["message"]
    assert warning["message"] in output
