"""When a worker logs and stores, after which steps; what it stores; and that another one goes on from that.

When it is asked to stop all ranks end after the same step, and what they have come to is stored.
"""

import copy
import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from cifar_dist.config import Config
from cifar_dist.data.batch import Batch
from cifar_dist.errors import UserError
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.run.checkpoint import LOWEST, Checkpoint, CheckpointState, Cursor, score_of
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.log import LOG, read_lines
from cifar_dist.run.network import Precision, expected_of
from cifar_dist.storage import Folder
from cifar_dist.train import cadence, rank_state
from cifar_dist.train import worker as worker_module
from cifar_dist.train.cadence import Agreement, Cadence, EpochEnd, RankZero
from cifar_dist.train.loop import Clock
from cifar_dist.train.moving_statistics import gather_statistics
from cifar_dist.train.optim import average_of, make_optimizers
from cifar_dist.train.saver import Saver
from cifar_dist.train.state import TrainState
from cifar_dist.train.step import update
from cifar_dist.train.validation import Validation
from cifar_dist.train.worker import Worker

NUM_STEPS = 6


# After which steps.


class Steps:
    """Counts steps of a cadence. `due`: the global steps at which rank 0's clock wants a checkpoint; `stop_at`: the one
    from which on the ranks are asked to stop."""

    def __init__(self, due: set[int], agree_every: int, stop_at: float = math.inf, **settings) -> None:
        config, cpu, model = Config().replace(**settings), torch.device("cpu"), nn.Linear(1, 1)
        self.state = TrainState(
            config=config,
            model=model,
            trainable=model,
            optimizers=[],
            precision=Precision("fp32", cpu),
            average=None,
            device=cpu,
            rank=0,
            world=1,
            steps_per_epoch=NUM_STEPS,
        )
        self.due, self.agree_every, self.stop_at = due, agree_every, stop_at
        self.logged, self.agreed, self.stored = [], [], []
        self.cadence, self.has_ended = Cadence(config, self), False

    def decide(self, _seconds_per_step: float) -> Agreement:
        step = self.state.global_step
        self.agreed.append(step)
        return Agreement(step in self.due, self.agree_every, step >= self.stop_at)

    def decide_epoch(self, score: tuple[float, float]) -> EpochEnd:
        return EpochEnd(is_due=False, is_best=score[0] > 0.5)

    def step(self, cursor: Cursor) -> None:
        self.state.cursor = cursor
        if self.cadence.is_logged(self.state):
            self.logged.append(self.state.global_step)
        if self.cadence.is_checkpoint_due(self.state):
            self.stored.append(self.state.global_step)
        self.has_ended = self.cadence.ends_here(self.state)


def two_epochs(due: tuple = (), agree_every: int = 100, **settings) -> Steps:
    steps = Steps(set(due), agree_every, **settings)
    for epoch in range(2):
        for step in range(NUM_STEPS):
            steps.step(Cursor(epoch, step + 1))
    return steps


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


@pytest.mark.parametrize(
    ("due", "settings", "stored"),
    [
        ((), {}, [False, True]),  # the last one is always stored
        ((6,), {"agree_every": 5}, [True, True]),  # by time, with the epoch's last step
        ((3,), {"agree_every": 2}, [False, True]),  # by time, but before: stored then
        ((), {"checkpoint_every_steps": 6}, [True, True]),
        ((), {"checkpoint_every_steps": 4}, [False, True]),
        ((), {"epochs": 9}, [False, False]),
    ],
)
def test_an_epoch_that_is_not_the_best_is_stored_only_if_it_is_due_or_the_last(due, settings, stored):
    steps, found = Steps(set(due), **{"agree_every": 100, "epochs": 2, **settings}), []
    for epoch in range(2):
        for step in range(NUM_STEPS):
            steps.step(Cursor(epoch, step + 1))
        steps.state.cursor = Cursor(epoch + 1, 0)
        found.append(steps.cadence.end_of_epoch(steps.state, (0.4, 0.0)))
    assert found == [EpochEnd(is_due=is_stored, is_best=False) for is_stored in stored]


def rank_zero(waited_seconds: float, **settings) -> RankZero:
    saver = SimpleNamespace(saved_at=cadence.time.monotonic() - waited_seconds)
    calls = {"a_node_is_leaving": lambda: False, "asks_to_stop": lambda: False, "say": print}
    return RankZero(Config().replace(**settings).checkpoint, saver=saver, **calls, best=(0.5, -1.0))


NAN_LOSS = {"validation_accuracy": 0.9, "validation_loss": math.nan}


@pytest.mark.parametrize(
    ("score", "is_best"),
    [
        *(((0.6, -9.0), True), ((0.5, -0.9), True), ((0.4, -0.1), False), ((0.5, -1.1), False)),
        ((0.5, -1.0), True),  # as good: among stored checkpoints the newer one counts as the best
        (score_of(NAN_LOSS), False),
    ],
)
def test_an_epoch_is_stored_if_it_is_the_best_so_far(score, is_best):
    zero = rank_zero(1)
    assert zero.decide_epoch(score) == EpochEnd(is_due=is_best, is_best=is_best)
    assert zero.decide_epoch((0.55, 0.0)).is_best is (score < (0.55, 0.0))  # the best so far is remembered


def test_a_loss_that_is_not_finite_is_not_even_the_first_best():
    zero = rank_zero(1)
    zero.best = LOWEST
    assert not zero.decide_epoch(score_of(NAN_LOSS)).is_best
    assert zero.decide_epoch((0.0, -99.0)).is_best


@pytest.mark.parametrize(("waited", "every", "is_due"), [(299, 300, False), (301, 300, True), (1, 0, True)])
def test_an_epoch_is_stored_by_time_and_each_one_if_there_is_no_time(waited, every, is_due):
    zero = rank_zero(waited, checkpoint_every_seconds=every)
    assert zero.decide_epoch((0.1, 0.0)) == EpochEnd(is_due=is_due, is_best=False)


@pytest.mark.parametrize(("stop_at", "last"), [(1, 1), (2, 3), (3, 3), (4, 5)])
def test_asked_to_stop_it_stores_at_the_next_agreement_and_goes_no_further(stop_at, last):
    steps = Steps(set(), 2, stop_at)
    for step in range(last - 1):
        steps.step(Cursor(0, step + 1))
    assert (steps.stored, steps.has_ended) == ([], False)
    steps.step(Cursor(0, last))
    assert (steps.stored, steps.has_ended) == ([last], True)


def test_asked_to_stop_where_the_epoch_ends_the_checkpoint_is_the_epoch_s():
    """Then it is validated as well, and run() ends after it."""
    steps = Steps(set(), 5, stop_at=6)
    for step in range(NUM_STEPS):
        steps.step(Cursor(0, step + 1))
    assert (steps.stored, steps.has_ended, steps.cadence.stops) == ([], False, True)


# What is stored.


class Rank:
    """The state of a rank with a small network."""

    def __init__(self, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        config, cpu = Config().replace(ema_decay=0.5, optimizer="adam", learning_rate=0.1), torch.device("cpu")
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), KerasBatchNorm(4, momentum=0.5), nn.Linear(4, 2))
        self.state = TrainState(
            config=config,
            model=model,
            trainable=model,
            optimizers=make_optimizers(model, config.optim),
            precision=Precision("fp16", cpu),
            average=average_of(model, config.optim),
            device=cpu,
            rank=rank,
            world=world,
            steps_per_epoch=NUM_STEPS,
        )

    def step(self, num: int = 1) -> None:
        state = self.state
        for _ in range(num):
            images = torch.randn(5, 3, generator=torch.Generator().manual_seed(state.global_step))
            state.precision.scaler.scale(state.model(images).square().sum()).backward()
            update(state)
            state.average.set_step()
            state.average.update_parameters(state.model)
            state.totals += torch.tensor([1.5, 2, 5])
            state.cursor = Cursor(state.cursor.epoch, state.cursor.step + 1)

    def stored(self) -> tuple[Checkpoint, CheckpointState]:
        """Of now, as it would be read again."""
        state = self.state
        held = copy.deepcopy(rank_state.checkpoint_state(state, rank_state.gather_rows(state)))
        meta = rank_state.checkpoint_meta(state, state.totals.tolist(), None)
        return Checkpoint("name", {**meta, "epoch": state.cursor.epoch, "step": state.cursor.step, "attempt": 1}), held

    def restore(self, checkpoint: Checkpoint, held: CheckpointState) -> None:
        rank_state.restore(self.state, checkpoint, held, "name")


def everything(rank: Rank) -> list[Any]:
    """All that later steps depend on, tensors as lists."""
    state = rank.state
    tensors = {**state.model.state_dict(), **{f"average {k}": v for k, v in state.average.state_dict().items()}}
    moments = [list(values.values()) for values in state.optimizers[0].state_dict()["state"].values()]
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    return [values, [[m.tolist() for m in pair] for pair in moments], state.precision.scaler.state_dict(), state.cursor]


def test_another_worker_goes_on_from_what_one_has_stored():
    """Weights and their average, moments, the loss's scale, the cursor and the totals; then the same steps."""
    one, other = Rank(), Rank(seed=1)
    one.step()
    one.state.precision.scaler.update(512.0)
    one.step(2)
    other.restore(*one.stored())
    assert everything(other) == everything(one)
    assert other.state.totals.tolist() == [4.5, 6, 15]
    for worker in (one, other):
        worker.step(2)
    assert everything(other) == everything(one)


def test_of_several_workers_each_has_its_own_statistics_back_and_one_has_the_totals():
    one = Rank(world=2)
    one.step(2)
    checkpoint, loaded = one.stored()
    assert loaded.ranks.keys() == {"model", "average"}
    rows = {name: torch.stack([row[0], row[0] + 1]) for name, row in loaded.ranks.items()}
    loaded = dataclasses.replace(loaded, ranks=rows)
    for rank, totals in enumerate(([3.0, 4, 10], [0, 0, 0])):
        other = Rank(rank, world=2, seed=1)
        other.restore(checkpoint, loaded)
        for name, model in rank_state.models_of(other.state).items():
            assert torch.equal(gather_statistics(model)[0], rows[name][rank])
        assert other.state.totals.tolist() == totals
    alone = Rank()  # of another number of workers each takes the mean, which the model's own weights hold
    alone.restore(checkpoint, loaded)
    assert torch.equal(gather_statistics(alone.state.model), gather_statistics(one.state.model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_stored(value, tmp_path):
    worker = Stored(tmp_path).opened()
    worker.state.totals[0] = value
    with pytest.raises(UserError, match="the training loss became infinite or not a number by step 0"):
        worker._store()
    worker.state.totals[0] = 1.0
    worker.state.model[2].weight.data[1, 2] = value
    with pytest.raises(UserError, match="a weight became infinite or not a number by step 0"):
        worker._store()
    worker.saver.close()
    assert Checkpoints(str(tmp_path)).all() == []


class FakeValidation:
    """Validation finds 6 of 20 images; `evaluated` is what it was given."""

    evaluated: nn.Module | None = None

    def __init__(self, state: TrainState) -> None:
        self.state = state

    def network(self) -> nn.Module:
        return Validation(self.state, None).network()

    def totals(self, model: nn.Module) -> list[float]:
        self.evaluated = model
        return [50.0, 6.0, 20.0]

    def recalibrate(self, _model: nn.Module, _num_batches: int) -> None:
        raise AssertionError("nothing asks for it")


def test_an_epoch_ends_with_the_average_evaluated_and_the_next_one_begun(tmp_path):
    worker = Stored(tmp_path).opened()
    worker.validation = FakeValidation(worker.state)
    rank = Rank()
    rank.state = worker.state
    rank.step(NUM_STEPS)
    worker._end_epoch(Clock())
    worker.saver.close()
    assert worker.validation.evaluated is worker.state.average.module
    assert (worker.state.cursor, worker.state.totals.tolist()) == (Cursor(1, 0), [0, 0, 0])
    latest = Checkpoints(str(tmp_path)).latest()
    metrics = latest.meta["metrics"]
    assert (latest.cursor, latest.meta["totals"]) == (Cursor(1, 0), [0, 0, 0])
    assert (metrics["train_loss"], metrics["train_accuracy"]) == (1.5 / 5, 2 / 5)
    assert (metrics["validation_loss"], metrics["validation_accuracy"]) == (2.5, 0.3)
    assert (metrics["num_validation_correct"], metrics["num_validation"]) == (6, 20)


# A run on storage.

DRIVER = "aaaaaaaa"


class RandomImages:
    """A rank's images, which are random: five for each step."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.train_ids, self.validation_ids = state, range(5 * state.world * NUM_STEPS), range(20)

    def train_batches(self, cursor: Cursor) -> Iterator[Batch]:
        for step in range(cursor.step, NUM_STEPS):
            generator = torch.Generator().manual_seed(100 * cursor.epoch + 10 * step + self.state.rank)
            images, labels = torch.randn(5, 3, generator=generator), torch.randint(2, (5,), generator=generator)
            ids, size = np.arange(5), 5 * self.state.world
            yield Batch(images=images, labels=labels, ids=ids, num_counted=5, global_size=size)

    def validation_batches(self) -> Iterator[Batch]:
        return self.train_batches(Cursor(9, 0))

    def trained(self, model: nn.Module) -> nn.Module:
        return model


class ConstantValidation(FakeValidation):
    """Validation finds 12 of 20 images in each epoch."""

    def totals(self, _model: nn.Module) -> list[float]:
        return [10.0, 12.0, 20.0]


class Stored(Worker):
    """One rank of a run at `uri`; its images are random. `said`: what it told the driver."""

    def __init__(self, uri: Path | str, rank: int = 0, world: int = 1, **settings: Any) -> None:
        state = Rank(rank, world).state
        defaults = {"epochs": 2, "global_batch_size": 5 * world, "chance_warning_steps": 0}
        state.config = state.config.replace(**{**defaults, **settings})
        state.precision = Precision("fp32", torch.device("cpu"))
        if not state.config.optim.ema_decay:
            state.average = None
        self.said: list[str] = []
        progress: dict[str, Callable] = {"say": self.said.append, "trains": lambda: None}
        progress |= dict.fromkeys(("update", "measured"), lambda _values: None)
        progress["asks_to_stop"] = lambda: state.global_step >= self.stop_at
        self.stop_at = math.inf
        manifest = SimpleNamespace(num_classes=10, sha256="abc", class_names=["a"] * 10, has_validation=False)
        data, launch = SimpleNamespace(uri="data", manifest=manifest), SimpleNamespace(profile=False)
        plan = SimpleNamespace(config=state.config, run=Run(str(uri)), data=data, launch=launch, weights=None)
        attempt = plan.run.attempts(DRIVER).claim(takeover=True) if rank == 0 else 0
        job = SimpleNamespace(
            plan=plan,
            driver=DRIVER,
            attempt=attempt,
            git_commit="unknown",
            progress=SimpleNamespace(**{n: SimpleNamespace(remote=act) for n, act in progress.items()}),
        )
        super().__init__(job, state, RandomImages(state), lambda: False)
        self.use(ConstantValidation(state))

    def use(self, validation: FakeValidation) -> "Stored":
        self.validation = self.diagnosis.validation = validation
        return self

    def resumed(self) -> "Stored":
        """From the newest checkpoint, if there is one."""
        expect = expected_of(self.plan.config, self.plan.data.manifest)
        self.resume(self.run_folder.checkpoints.load_newest(expect))
        return self

    def opened(self) -> "Stored":
        """With a saver, behind no checkpoint."""
        self._open_saver(None)
        return self


@pytest.fixture
def alone(monkeypatch) -> None:
    """No Ray and no process group; each step comes with an agreement."""
    without_ray(monkeypatch.setattr)
    monkeypatch.setattr(rank_state.dist, "all_gather_object", lambda found, mine: found.__setitem__(0, mine))


def without_ray(put: Callable[[Any, str, Any], None]) -> None:
    put(cadence, "AGREE_SECONDS", 0.0)
    put(worker_module.ray, "get", lambda answer, **_: answer)


def lines_of(uri: Path, kind: str = "") -> list[dict[str, Any]]:
    return [line for line in read_lines(Folder(str(uri))) if not kind or line["kind"] == kind]


# Which epochs are stored.


class Scored(ConstantValidation):
    """Validation finds so many of 20 images after each epoch."""

    num_correct: list[float]

    def totals(self, _model: nn.Module) -> list[float]:
        return [10.0, self.num_correct[self.state.cursor.epoch], 20.0]


def scored(uri: Path, num_correct: list[float], **settings: Any) -> Stored:
    worker = Stored(uri, epochs=len(num_correct), keep_checkpoints=9, **settings).resumed()
    worker.use(Scored(worker.state))
    worker.validation.num_correct = num_correct
    return worker


def stored_epochs(uri: Path) -> list[int]:
    return [checkpoint.cursor.epoch for checkpoint in Checkpoints(str(uri)).all()]


@pytest.mark.usefixtures("alone")
def test_of_a_run_the_best_epochs_and_the_last_are_stored(tmp_path, monkeypatch):
    """All are logged. A run that goes on knows the best that it has stored."""
    monkeypatch.setattr(Saver, "save", waiting(Saver.save))
    scored(tmp_path, [5, 9, 7, 8]).run()
    assert stored_epochs(tmp_path) == [1, 2, 4]
    assert [line["epoch"] for line in lines_of(tmp_path, "epoch")] == [0, 1, 2, 3]
    scored(tmp_path, [5, 9, 7, 8, 8, 10, 1]).run()
    assert stored_epochs(tmp_path) == [1, 2, 4, 6, 7]
    assert Checkpoints(str(tmp_path)).best().cursor.epoch == 6


def waiting(save: Callable[..., None]) -> Callable[..., None]:
    """Saves, and waits for it: these epochs take less time than a write."""

    def save_and_wait(saver: Saver, *args: Any, **named: Any) -> None:
        save(saver, *args, **named)
        saver.wait()

    return save_and_wait


@pytest.mark.usefixtures("alone")
def test_where_epochs_are_faster_than_storage_the_best_and_the_last_are_stored(tmp_path):
    scored(tmp_path, [5, 6, 9, 7, 8]).run()
    assert stored_epochs(tmp_path)[-1] == 5
    assert Checkpoints(str(tmp_path)).best().cursor.epoch == 3
    assert [line["epoch"] for line in lines_of(tmp_path, "epoch")] == [0, 1, 2, 3, 4]


# Asked to stop.

STOPS = {4: Cursor(0, 4), 6: Cursor(1, 0), 7: Cursor(1, 1), 12: Cursor(2, 0)}


def stopped(uri: Path | str, stop_at: float, rank: int = 0, world: int = 1) -> dict[str, Any]:
    worker, fault = Stored(uri, rank, world).resumed(), ""
    saver, worker.stop_at = worker.saver, stop_at
    try:
        worker.run()
    except UserError as error:
        fault = str(error)
    found = {"fault": fault, "cursor": list(worker.state.cursor), "totals": worker.state.totals.tolist()}
    return {**found, "closed": saver is not None and saver._pool._shutdown and saver.log._written.closed}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("stop_at", STOPS)
def test_a_run_that_is_asked_to_stop_stores_what_it_has_come_to(tmp_path, stop_at):
    found = stopped(tmp_path, stop_at)
    assert (found["fault"], found["closed"]) == ("the run was asked to stop", True)
    latest = Checkpoints(str(tmp_path)).latest()
    assert latest.cursor == Cursor(*found["cursor"]) == STOPS[stop_at]
    assert (latest.meta["metrics"] is None) is (latest.cursor.step > 0)
    assert latest.meta["totals"] == found["totals"]


@pytest.mark.usefixtures("alone")
def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path):
    for stop_at in (4, 6, 7):
        stopped(tmp_path / "often", stop_at)
    often, once = (stopped(tmp_path / name, math.inf) for name in ("often", "once"))
    assert often == once == {"fault": "", "cursor": [2, 0], "totals": [0, 0, 0], "closed": True}
    ends = [Checkpoints(str(tmp_path / name)) for name in ("often", "once")]
    one, other = (end.load(end.latest()) for end in ends)
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    assert all(torch.equal(one.average[name], other.average[name]) for name in one.average)
    epochs = [[line["train_loss"] for line in lines_of(tmp_path / name, "epoch")] for name in ("often", "once")]
    assert epochs[0] == epochs[1]


@pytest.mark.usefixtures("alone")
def test_a_driver_that_is_gone_asks_for_nothing(tmp_path, monkeypatch):
    def gone(*_: Any, **__: Any) -> Any:
        raise worker_module.ray.exceptions.GetTimeoutError

    monkeypatch.setattr(worker_module.ray, "get", gone)
    assert stopped(tmp_path, 1)["fault"] == ""


def in_a_group(rank: int, folder: Path) -> None:
    """One of two processes; they are asked to stop at each of STOPS in turn, each in a run of its own."""
    torch.set_num_threads(1)
    without_ray(setattr)
    for stop_at in STOPS:
        uri = folder / str(stop_at)
        place, limit = f"file://{folder}/group-{stop_at}", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=limit)
        torch.save(stopped(uri, stop_at if rank == 0 else math.inf, rank, 2), folder / f"{stop_at}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("group")
    multiprocessing.set_forkserver_preload([worker_module.__name__])
    torch.multiprocessing.start_processes(in_a_group, (folder,), 2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("stop_at", STOPS)
def test_all_ranks_stop_after_the_same_step_and_one_says_so(group, stop_at):
    """Only rank 0 asks the driver. An error of another rank would cut rank 0 off before all is stored."""
    first, second = (torch.load(group / f"{stop_at}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (first["fault"], second["fault"]) == ("the run was asked to stop", "")
    assert (first["closed"], second["closed"]) == (True, False)
    assert Cursor(*first["cursor"]) == Cursor(*second["cursor"]) == STOPS[stop_at]
    checkpoints = Checkpoints(str(group / str(stop_at)))
    latest = checkpoints.latest()
    assert (latest.cursor, latest.meta["world_size"]) == (STOPS[stop_at], 2)
    assert latest.meta["totals"] == [a + b for a, b in zip(first["totals"], second["totals"], strict=True)]
    loaded = checkpoints.load(latest)
    if latest.cursor.step:  # inside an epoch each rank has its own statistics
        assert not torch.equal(*loaded.ranks["model"])
    assert loaded.ranks["model"].shape[0] == 2


# What it warns of.


@pytest.mark.usefixtures("alone")
def test_a_warning_is_said_once_per_attempt_and_recorded_once_per_run(tmp_path):
    for attempt in (1, 2, 3):
        worker = Stored(tmp_path).resumed()
        for _ in range(2):
            worker.reporter.warn("kind", "a sentence", accuracy=0.5)
        worker.reporter.warn(f"kind {attempt}", "another sentence")
        assert worker.said[-2:] == ["WARNING: a sentence", "WARNING: another sentence"]
        assert worker.said.count("WARNING: a sentence") == 1
        worker.state.cursor = Cursor(0, attempt)
        worker._store()
        worker.saver.close()
    assert [line["warning"] for line in lines_of(tmp_path, "warning")] == ["kind", "kind 1", "kind 2", "kind 3"]
    (first, *_) = lines_of(tmp_path, "warning")
    assert (first["message"], first["accuracy"]) == ("a sentence", 0.5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("damage", ["removed", "shortened", "one byte"])
def test_a_log_that_was_lost_is_said_and_training_goes_on(tmp_path, damage):
    stopped(tmp_path, 7)
    path = tmp_path / LOG
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "shortened" else content.replace(b"1", b"2", 1))
    worker = Stored(tmp_path).resumed()
    (said,) = (text for text in worker.said if text.startswith("WARNING: "))
    assert "metrics.jsonl is not the log that the checkpoint was written with; a new one begins" in said
    assert worker.state.cursor == STOPS[7]
    worker.run()
    assert worker.state.cursor == Cursor(2, 0)
    lines = lines_of(tmp_path)
    assert (lines[0]["warning"], lines[0]["global_step"]) == ("log_lost", 7)
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1]
    again = Stored(tmp_path, epochs=3).resumed()
    assert not again.saver.log.lost


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("settings", "warned"), [({"schedule": "cosine"}, True), ({"schedule": "constant"}, False)])
def test_a_schedule_of_another_length_is_warned_of_once(tmp_path, settings, warned):
    worker = Stored(tmp_path, **settings).resumed()
    worker.run()
    for epochs in (4, 4, 5):
        worker = Stored(tmp_path, epochs=epochs, **settings).resumed()
        worker.stop_at = 13
        with pytest.raises(UserError):
            worker.run()
    kinds = [line["warning"] for line in lines_of(tmp_path, "warning") if line["warning"].startswith("schedule")]
    assert kinds == (["schedule_of_4_epochs", "schedule_of_5_epochs"] if warned else [])


@pytest.mark.usefixtures("alone")
def test_training_at_chance_is_warned_of_from_the_step_on_that_was_asked_for(tmp_path):
    """Chance is a tenth."""
    worker = Stored(tmp_path, chance_warning_steps=3).opened()
    for step in (2, 3, 4):
        worker.state.cursor = Cursor(0, step)
        worker.diagnosis.check_training(0.1, 1000, worker.reporter.place())
        assert [text.split(":")[0] for text in worker.said] == ["WARNING"] * (step > 2)
    assert "training accuracy is 10.0%, chance is 10.0%: the network is not learning" in worker.said[0]
    worker.saver.log.store(worker.saver.log.take())
    assert [(line["warning"], line["global_step"]) for line in lines_of(tmp_path)] == [("train_at_chance", 3)]


@pytest.mark.usefixtures("alone")
def test_training_is_diagnosed_with_every_logged_step_and_epoch(tmp_path):
    worker, seen = Stored(tmp_path, epochs=1, log_every_steps=4).resumed(), []
    worker.diagnosis.check_training = lambda _accuracy, num_seen, _place: seen.append(num_seen)
    worker.run()
    assert seen == [20, 30]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_recalibration_changes_the_statistics_and_nothing_else(tmp_path, ema_decay):
    """Of what is evaluated: the average of the weights where there is one."""
    kept = []
    for name, num_batches in (("plain", 0), ("again", 2)):
        settings = {"epochs": 1, "recalibrate_batches": num_batches, "ema_decay": ema_decay}
        worker = Stored(tmp_path / name, **settings)
        worker.use(Validation(worker.state, worker.images))
        worker.resumed().run()
        checkpoints = Checkpoints(str(tmp_path / name))
        kept.append(checkpoints.load(checkpoints.latest()))
    for tensors, others, is_evaluated in (
        (kept[0].model, kept[1].model, not ema_decay),
        (kept[0].average or {}, kept[1].average or {}, True),
    ):
        different = {name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])}
        assert different == ({"1.running_mean", "1.running_var"} if is_evaluated and tensors else set())


@pytest.mark.usefixtures("alone")
def test_few_images_at_a_time_are_warned_of(tmp_path):
    worker = Stored(tmp_path).resumed()
    worker.run()
    (line,) = lines_of(tmp_path, "warning")
    assert line["warning"] == "few_images_at_a_time"
    assert "only 5 images at a time" in line["message"]


class NotFinite(ConstantValidation):
    """Its second epoch's validation loss."""

    def totals(self, model: nn.Module) -> list[float]:
        loss, *others = super().totals(model)
        is_second = self.state.cursor.epoch == 1
        return [math.nan if is_second else loss, 19.0 if is_second else others[0], others[1]]


@pytest.mark.usefixtures("alone")
def test_a_validation_loss_that_is_not_finite_is_said_and_never_the_best(tmp_path):
    worker = Stored(tmp_path, epochs=3, keep_checkpoints=9, checkpoint_every_seconds=0).resumed()
    worker.use(NotFinite(worker.state))
    worker.run()
    (said,) = (text for text in worker.said if "not finite" in text)
    assert said.startswith("WARNING: the validation loss after epoch 2 is not finite: it is stored as null")
    checkpoints = Checkpoints(str(tmp_path))
    losses = {c.cursor.epoch: c.meta["metrics"]["validation_loss"] for c in checkpoints.all()}
    assert losses == {1: 0.5, 2: None, 3: 0.5}
    assert checkpoints.best().cursor.epoch == 3
    assert [line["validation_loss"] for line in lines_of(tmp_path, "epoch")] == [0.5, None, 0.5]
    assert checkpoints.load(checkpoints.all()[1]).model


class Lagging(FakeValidation):
    """Validation finds 3 of 20 images by the average of the weights and by BatchNorm's statistics as they are;
    `plain`: by the weights themselves, `recalibrated`: with statistics re-estimated."""

    def __init__(self, state: TrainState, plain: float, recalibrated: float) -> None:
        super().__init__(state)
        self.plain, self.recalibrated, self.num_recalibrated = plain, recalibrated, 0

    def totals(self, model: nn.Module) -> list[float]:
        found = self.plain if model is self.state.model else self.recalibrated if self.num_recalibrated else 3.0
        return [10.0, found, 20.0]

    def recalibrate(self, _model: nn.Module, _num_batches: int) -> None:
        self.num_recalibrated += 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("plain", "recalibrated", "kind", "part"),
    [
        (
            12.0,
            3.0,
            "average_lags",
            "The weights themselves reach 60.0%: the average lags behind them (--ema-decay 0.5",
        ),
        (3.0, 12.0, "validation_near_chance", "the moving statistics lag behind the weights"),
        (3.0, 3.0, "validation_near_chance", "it is not BatchNorm's moving statistics"),
    ],
)
def test_what_lagging_validation_comes_from_is_found_out(tmp_path, plain, recalibrated, kind, part):
    worker = Stored(tmp_path, chance_warning_steps=1).opened()
    validation = Lagging(worker.state, plain, recalibrated)
    worker.use(validation)
    for _ in range(2):
        worker.diagnosis.check_validation(worker.state.average.module, 0.6, 0.15)
    worker.saver.log.store(worker.saver.log.take())
    (line,) = lines_of(tmp_path, "warning")
    assert line["warning"] == kind
    assert part in line["message"]
    assert validation.num_recalibrated == (kind != "average_lags")
