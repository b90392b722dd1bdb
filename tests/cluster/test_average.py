"""--ema-decay on a real Ray cluster: the average of weights is stored, validated, evaluated and gone on with."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from job_process import assert_same_run, run_job, train_args

from cifar_dist.config import Config
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import eval_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.evaluate.shard import Shard, evaluate_shard
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.network import build_model, image_spec
from cifar_dist.run.splits import ids_of, stored_split

DECAY, NUM_STEPS = 0.9, 4  # two epochs of two steps


def args(data: str, storage: Path) -> list[str]:
    """Every step leaves its checkpoint. Weights that move fast are far from their average."""
    average = ("--ema-decay", str(DECAY), "--learning-rate", "0.01", "--precision", "fp32")
    steps = ("--epochs", "2", "--global-batch-size", "20", "--checkpoint-every-steps", "1", "--keep-checkpoints", "9")
    return train_args(data, storage, "averaged", 2, *average, *steps)


@pytest.fixture(scope="module")
def run(tiny_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("averaged")
    code, output = run_job(*args(tiny_uri, storage))
    assert code == 0, output
    return storage / "averaged"


@pytest.fixture(scope="module")
def stored(run: Path) -> list[tuple[Checkpoint, CheckpointState]]:
    checkpoints = Checkpoints(str(run))
    return [(checkpoint, checkpoints.load(checkpoint)) for checkpoint in checkpoints.all()]


def test_the_stored_average_is_that_of_the_stored_weights_of_every_step(
    stored: list[tuple[Checkpoint, CheckpointState]],
) -> None:
    """The first step's weights are the first average; buffers are averaged as parameters are."""
    assert [checkpoint.meta["global_step"] for checkpoint, _ in stored] == list(range(1, NUM_STEPS + 1))
    expected: dict[str, torch.Tensor] = {}
    for checkpoint, state in stored:
        assert "average.safetensors" in checkpoint.meta["files"]
        assert checkpoint.meta["num_averaged"] == checkpoint.meta["global_step"]
        assert state.average is not None
        assert state.average.keys() == state.model.keys()
        differ = {name for name, tensor in state.average.items() if not torch.equal(tensor, state.model[name])}
        trained = {name: tensor.double() for name, tensor in state.model.items() if not name.startswith("base.")}
        assert differ == (trained.keys() if checkpoint.meta["global_step"] > 1 else set())
        num_before = checkpoint.meta["global_step"] - 1
        decay = min(DECAY, (1 + num_before) / (10 + num_before))  # it warms up
        expected = {name: decay * expected.get(name, new) + (1 - decay) * new for name, new in trained.items()}
        found = {name: state.average[name].double() for name in trained}
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def scored(weights: dict, checkpoint: Checkpoint, data: str, split: str) -> tuple[torch.Tensor, float]:
    """(confusion [10, 10], mean loss) of the plain network with these weights over the split."""
    config, data_set, cpu = Config.from_dict(checkpoint.meta["config"]), DataSet.open(data), torch.device("cpu")
    spec = image_spec(config, cpu)
    model = build_model(config, data_set.manifest.num_classes, spec, cpu).eval()
    model.load_state_dict(weights)
    manifest = data_set.manifest
    loader = Loader(data_set, stored_split(split, manifest), spec, device=cpu, num_threads=1, max_batch_size=100)
    (batch,) = loader.batches(eval_plans(ids_of(split, config, manifest, loader.staged.labels), 100, 0, 1))
    with torch.inference_mode():
        logits = model(batch.images)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((batch.labels, logits.argmax(1)), torch.ones_like(batch.labels), accumulate=True)
    return confusion, F.cross_entropy(logits, batch.labels).item()


def test_validation_scores_the_average_and_not_the_weights(
    stored: list[tuple[Checkpoint, CheckpointState]], tiny_uri: str
) -> None:
    validated = [(checkpoint, state) for checkpoint, state in stored if checkpoint.meta["metrics"]]
    assert len(validated) == 2
    for checkpoint, state in validated:
        found = checkpoint.meta["metrics"]
        (average, average_loss), (_, weights_loss) = (
            scored(values, checkpoint, tiny_uri, "validation") for values in (state.average, state.model)
        )
        assert found["num_validation_correct"] == average.trace()
        assert found["validation_loss"] == pytest.approx(average_loss, rel=1e-4)
        assert found["validation_loss"] != pytest.approx(weights_loss, rel=1e-2)


def test_evaluation_scores_the_average_and_not_the_weights(
    stored: list[tuple[Checkpoint, CheckpointState]], run: Path, tiny_uri: str, tmp_path: Path
) -> None:
    checkpoint, state = stored[-1]
    splits = ("train", "validation", "test")
    found = evaluate_shard(
        Shard(
            run=Run(str(run)),
            checkpoint=checkpoint,
            data=DataSet.open(tiny_uri, Staging(folder=tmp_path)),
            splits=splits,
            index=0,
            num_shards=1,
        )
    )
    for split, (_, counts) in found.items():
        average, average_loss = scored(state.average, checkpoint, tiny_uri, split)
        assert counts.confusion.tolist() == average.tolist()
        assert counts.loss_micro / 1e6 / counts.num_images == pytest.approx(average_loss, rel=1e-4)
        assert counts.confusion.tolist() != scored(state.model, checkpoint, tiny_uri, split)[0].tolist()


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_with_its_average(
    run: Path, stored: list[tuple[Checkpoint, CheckpointState]], tiny_uri: str, tmp_path: Path
) -> None:
    """From a copy whose newest checkpoint is the one inside the second epoch."""
    cut, _ = stored[-2]
    assert cut.cursor == (1, 1)

    def is_later(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder).name == "checkpoints" and name != cut.name]

    shutil.copytree(run, tmp_path / "averaged", ignore=is_later)
    code, output = run_job(*args(tiny_uri, tmp_path))
    assert code == 0, output
    assert f"continuing from {cut.name}" in output
    assert_same_run(tmp_path / "averaged", run)
