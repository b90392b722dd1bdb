"""When a worker logs and stores, after which steps; what it stores; and that another one goes on from that."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.models import KerasBatchNorm
from cifar_dist.train import worker as worker_module
from cifar_dist.train.checkpoint import Checkpoint, Cursor, State
from cifar_dist.train.loop import Clock, TrainState, gather_statistics, update
from cifar_dist.train.optim import average_of, make_optimizers
from cifar_dist.train.precision import Precision
from cifar_dist.train.worker import Worker

NUM_STEPS = 6


class Steps(Worker):
    """Counts steps without data, storage and Ray; `due`: the global steps at which the clock wants a checkpoint."""

    def __init__(self, due: set[int], agree_every: int, **settings) -> None:
        config, cpu, model = Config().replace(**settings), torch.device("cpu"), nn.Linear(1, 1)
        precision = Precision("fp32", cpu)
        self.state = TrainState(config, model, model, [], precision, None, cpu, 0, 1, NUM_STEPS)
        self.job, self.saver = SimpleNamespace(config=config), None
        self.due, self.agree_every, self.steps_to_agree = due, agree_every, 1
        self.logged, self.agreed, self.stored = [], [], []

    def _on_log(self, _clock) -> None:
        self.logged.append(self.state.global_step)

    def _agree(self) -> bool:
        self.steps_to_agree = self.agree_every
        self.agreed.append(self.state.global_step)
        return self.state.global_step in self.due

    def _write_checkpoint(self, _metrics=None) -> None:
        self.stored.append(self.state.global_step)


def two_epochs(due: tuple = (), agree_every: int = 100, **settings) -> Steps:
    worker = Steps(set(due), agree_every, **settings)
    for epoch in range(2):
        for step in range(NUM_STEPS):
            worker.state.cursor = Cursor(epoch, step + 1)
            worker._after_step(Clock())
    return worker


def test_log_lines_are_counted_over_the_run():
    assert two_epochs(log_every_steps=4).logged == [4, 8, 12]


@pytest.mark.parametrize(
    ("every", "stored"), [(0, []), (4, [4, 8]), (3, [3, 9]), (1, [1, 2, 3, 4, 5, 7, 8, 9, 10, 11])]
)
def test_checkpoints_are_counted_over_the_run_but_an_epoch_that_ends_has_its_own(every, stored):
    assert two_epochs(checkpoint_every_steps=every).stored == stored


def test_ranks_agree_as_often_as_they_agreed_to_and_store_once_where_both_want_it():
    worker = two_epochs(due=(1, 4, 7), agree_every=3, checkpoint_every_steps=4)
    assert worker.agreed == [1, 4, 7, 10]
    assert worker.stored == [1, 4, 7, 8]


def test_checkpoint_that_is_due_where_the_epoch_ends_is_the_epoch_s():
    assert two_epochs(due=(6,), agree_every=5).stored == []


# What is stored.


class Alone(Worker):
    """A rank with a small network, without data, storage and Ray; `saved`: what it gave to its saver."""

    def __init__(self, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        config, cpu = Config().replace(ema_decay=0.5, optimizer="adam", learning_rate=0.1), torch.device("cpu")
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), KerasBatchNorm(4, momentum=0.5), nn.Linear(4, 2))
        precision, average = Precision("fp16", cpu), average_of(model, config.optim)
        optimizers = make_optimizers(model, config.optim)
        self.state = TrainState(config, model, model, optimizers, precision, average, cpu, rank, world, NUM_STEPS)
        self.rank, self.world, self.num_threads = rank, world, 1
        self.job = SimpleNamespace(config=config, weights=None, data_uri="data", git_commit="unknown")
        self.manifest = SimpleNamespace(num_classes=10, sha256="abc", class_names=["a"] * 10)
        self.train_ids, self.saved, self.waits = range(9), [], {"seconds": 1.0}
        self.checkpoints = SimpleNamespace(latest=lambda: None, where=lambda name: name)
        log = SimpleNamespace(take=lambda: [{"kind": "step"}])
        self.saver: Any = SimpleNamespace(log=log, save=lambda *parts: self.saved.append(parts), wait=lambda: None)

    def step(self, num: int = 1) -> None:
        state = self.state
        for _ in range(num):
            images = torch.randn(5, 3, generator=torch.Generator().manual_seed(state.global_step))
            state.precision.scaler.scale(state.model(images).square().sum()).backward()
            update(state)
            state.average.update_parameters(state.model)
            state.totals += torch.tensor([1.5, 2, 5])
            state.cursor = Cursor(state.cursor.epoch, state.cursor.step + 1)

    def stored(self) -> tuple[Checkpoint, State]:
        """Of now, as it would be read again."""
        self._write_checkpoint()
        cursor, state, meta = copy.deepcopy(self.saved[-1])
        return Checkpoint("name", {**meta, "epoch": cursor.epoch, "step": cursor.step, "attempt": 1}), state


def everything(worker: Alone) -> list[Any]:
    """All that later steps depend on, tensors as lists."""
    state = worker.state
    tensors = {**state.model.state_dict(), **{f"average {k}": v for k, v in state.average.state_dict().items()}}
    moments = [list(values.values()) for values in state.optimizers[0].state_dict()["state"].values()]
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    return [values, [[m.tolist() for m in pair] for pair in moments], state.precision.scaler.state_dict(), state.cursor]


def test_another_worker_goes_on_from_what_one_has_stored():
    """Weights and their average, moments, the loss's scale, the cursor and the totals; then the same steps."""
    one, other = Alone(), Alone(seed=1)
    one.step()
    one.state.precision.scaler.update(512.0)
    one.step(2)
    other._restore(*one.stored())
    assert everything(other) == everything(one)
    assert other.state.totals.tolist() == [4.5, 6, 15]
    for worker in (one, other):
        worker.step(2)
    assert everything(other) == everything(one)


def test_of_several_workers_each_has_its_own_statistics_back_and_one_has_the_totals():
    one = Alone(world=2)
    one.step(2)
    checkpoint, loaded = one.stored()
    assert loaded.ranks.keys() == {"model", "average"}
    rows = {name: torch.stack([row[0], row[0] + 1]) for name, row in loaded.ranks.items()}
    loaded = dataclasses.replace(loaded, ranks=rows)
    for rank, totals in enumerate(([3.0, 4, 10], [0, 0, 0])):
        other = Alone(rank, world=2, seed=1)
        other._restore(checkpoint, loaded)
        for name, model in other._models().items():
            assert torch.equal(gather_statistics(model)[0], rows[name][rank])
        assert other.state.totals.tolist() == totals
    alone = Alone()  # of another number of workers each takes the mean, which the model's own weights hold
    alone._restore(checkpoint, loaded)
    assert torch.equal(gather_statistics(alone.state.model), gather_statistics(one.state.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stored(value):
    worker = Alone()
    worker.step()
    worker.state.totals[0] = value
    with pytest.raises(UserError, match="the training loss became infinite or not a number by step 1"):
        worker._write_checkpoint()
    worker.state.totals[0] = 1.0
    worker.state.model[2].weight.data[1, 2] = value
    with pytest.raises(UserError, match="a weight became infinite or not a number by step 1"):
        worker._write_checkpoint()
    assert worker.saved == []


class Ending(Alone):
    """Validation finds 6 of 20 images; `evaluated` is what it was given, `seen` the state when it stored."""

    def _validate(self, model: nn.Module) -> list[float]:
        self.evaluated = model
        return [50.0, 6.0, 20.0]

    def _write_checkpoint(self, metrics: dict[str, Any] | None = None) -> None:
        self.seen = metrics, self.state.cursor, self.state.totals.tolist()

    def _check_train_chance(self, *_: Any) -> None:
        pass

    _check_validation = _check_train_chance


def test_an_epoch_ends_with_the_average_evaluated_and_the_next_one_begun(monkeypatch):
    monkeypatch.setattr(worker_module.ray.train, "report", lambda _metrics: None)
    worker = Ending()
    worker.saver = None
    worker.step(NUM_STEPS)
    worker._end_epoch(Clock())
    assert worker.evaluated is worker.state.average.module
    metrics, cursor, totals = worker.seen
    assert (cursor, totals) == (Cursor(1, 0), [0, 0, 0])
    assert (metrics["train_loss"], metrics["train_accuracy"]) == (1.5 / 5, 2 / 5)
    assert (metrics["validation_loss"], metrics["validation_accuracy"]) == (2.5, 0.3)
    assert (metrics["num_validation_correct"], metrics["num_validation"]) == (6, 20)
