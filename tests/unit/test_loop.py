"""One epoch of training: exact gradients for any ranks, ranks that change, precision, clipping, validation."""

import copy
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import Config
from cifar_dist.data.batch import Batch
from cifar_dist.data.order import ImageSpec, epoch_order, rank_part, train_plans
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision, eval_batch
from cifar_dist.train import communication
from cifar_dist.train.communication import FactoredLinear, factor_layers, parallel
from cifar_dist.train.loop import Clock, sum_over_ranks, train_epoch, validate
from cifar_dist.train.moving_statistics import (
    average_batchnorm_over_ranks,
    gather_statistics,
    recalibrate_batchnorm,
    set_statistics,
    split_statistics,
    statistics_of,
)
from cifar_dist.train.optim import average_of, make_optimizers, schedule_factor
from cifar_dist.train.state import TrainState
from cifar_dist.train.step import Step, backward, update

CPU = torch.device("cpu")
NUM_CLASSES = 5


def plain_model() -> nn.Module:
    """No BatchNorm, whose statistics would depend on the split, and no dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))


def state_of(model: nn.Module, rank: int = 0, world: int = 1, steps_per_epoch: int = 5, **settings) -> TrainState:
    config = Config().replace(
        **{"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "precision": "fp32", **settings}
    )
    return TrainState(
        config=config,
        model=model,
        trainable=model,
        optimizers=make_optimizers(model, config.optim),
        precision=Precision(config.loop.precision, CPU),
        average=average_of(model, config.optim),
        device=CPU,
        rank=rank,
        world=world,
        steps_per_epoch=steps_per_epoch,
    )


def images_and_labels(n: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 2, 2, generator=generator), torch.randint(NUM_CLASSES, (n,), generator=generator)


def whole(n: int, seed: int = 1) -> Batch:
    images, labels = images_and_labels(n, seed)
    return Batch(images=images, labels=labels, ids=np.arange(n), num_counted=n, global_size=n)


def part(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's part of a global batch as the loader hands it out: a rank without one works on another's, which does
    not count."""
    n = batch.global_size
    start, stop, _, counts = rank_part(0, n, n, rank, world)
    rows = slice(start, stop)
    return Batch(
        images=batch.images[rows],
        labels=batch.labels[rows],
        ids=batch.ids[rows],
        num_counted=(stop - start) * counts,
        global_size=n,
    )


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def mean_gradient(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """The definition: of the mean loss over the global batch."""
    copied = copy.deepcopy(model)
    F.cross_entropy(copied(batch.images), batch.labels, label_smoothing=smoothing).backward()
    return gradient(copied)


def totals_of(model: nn.Module, batch: Batch) -> list[float]:
    logits = model(batch.images)
    loss = F.cross_entropy(logits, batch.labels, reduction="sum").item()
    return [loss, (logits.argmax(1) == batch.labels).sum().item(), len(batch.labels)]


def test_a_gpu_validates_small_images_in_large_batches() -> None:
    assert [eval_batch(torch.device("cuda"), side) for side in (32, 96, 224, 448, 4096)] == [1000, 1000, 256, 64, 32]
    assert eval_batch(CPU, 32) == 100


# The gradient.


@pytest.mark.parametrize("accumulation", [1, 2, 3, 100])
@pytest.mark.parametrize(("n", "world"), [(12, 1), (12, 3), (11, 3), (7, 4), (2, 3), (1, 3)])
def test_gradient_is_the_mean_over_the_global_batch(n, world, accumulation):
    """Averaging over ranks is what DistributedDataParallel does."""
    model, batch = plain_model(), whole(n)
    gradients, totals = [], torch.zeros(3, dtype=torch.float64)
    for rank in range(world):
        state = state_of(copy.deepcopy(model), rank, world, accumulation_steps=accumulation)
        totals += backward(state, part(batch, rank, world))
        gradients.append(gradient(state.model))
    assert torch.allclose(torch.stack(gradients).mean(0), mean_gradient(model, batch), atol=1e-6)
    assert totals.tolist() == pytest.approx(totals_of(model, batch), rel=1e-6)


@pytest.mark.parametrize(
    ("n", "accumulation", "sizes"), [(7, 3, [3, 2, 2]), (7, 100, [3, 2, 2]), (7, 2, [4, 3]), (3, 2, [3]), (1, 4, [1])]
)
def test_no_part_of_a_step_is_a_single_image_unless_the_step_is(n, accumulation, sizes):
    """BatchNorm has no variance of one value."""
    model, seen = plain_model(), []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    backward(state_of(model, accumulation_steps=accumulation), whole(n))
    assert seen == sizes


def test_label_smoothing_is_in_the_gradient():
    model, batch = plain_model(), whole(6)
    state = state_of(copy.deepcopy(model), label_smoothing=0.2)
    backward(state, batch)
    assert torch.allclose(gradient(state.model), mean_gradient(model, batch, 0.2), atol=1e-6)
    assert not torch.allclose(gradient(state.model), mean_gradient(model, batch), atol=1e-3)


def test_rank_with_an_empty_part_contributes_nothing():
    batch = whole(2)
    empty = part(batch, 1, 3)
    assert (empty.num_counted, len(empty.labels)) == (0, 2)
    state = state_of(plain_model(), 1, 3, accumulation_steps=2)
    assert backward(state, empty).tolist() == [0, 0, 0]
    assert not gradient(state.model).any()


def in_groups(rank: int, folder: Path) -> None:
    """One process of a real gloo group, of three and then of two (starting them costs most of the time)."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            rendezvous = f"file://{folder}/rendezvous-{world}"
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
            torch.save(in_a_group(rank, world), folder / f"{rank}-of-{world}.pt")
            dist.destroy_process_group()


def in_a_group(rank: int, world: int) -> dict:
    gradients, totals = [], []
    for n in (7, 2):
        state = state_of(plain_model(), rank, world, accumulation_steps=2)
        state.trainable = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
        totals.append(sum_over_ranks(backward(state, part(whole(n), rank, world))))
        gradients.append(gradient(state.model))
    factored = with_factors(rank, world)
    layers = nn.Sequential(KerasBatchNorm(2), KerasBatchNorm(2).requires_grad_(False))
    for layer in layers:
        layer.running_mean += torch.tensor([rank, 10.0])
        layer.running_var += rank
    rows, no_rows = gather_statistics(layers), gather_statistics(plain_model())
    average_batchnorm_over_ranks(layers)
    recalibrated, mine = dropout_model(), part(whole(7), rank, world)
    recalibrate_batchnorm(recalibrated, [mine], 1, Precision("fp32", CPU))
    mean = recalibrated[1](mine.images.flatten(1)).mean(0).detach()
    batchnorm = {"found": recalibrated[2].running_mean, "mean": mean}
    return {
        **{
            "factored": factored,
            "gradients": gradients,
            "totals": totals,
            "layers": layers.state_dict(),
            "batchnorm": batchnorm,
        },
        **{"rows": rows, "no_rows": no_rows},
    }


def with_factors(rank: int, world: int) -> list[torch.Tensor]:
    """Gradients where the first layer's factors are exchanged, from rank 0's weights."""
    communication.BUCKET_BYTES = 500  # the second layer's gradient is smaller
    gradients = []
    for n in (7, 2, 7):
        state = state_of(plain_model(), rank, world)
        for parameter in state.model.parameters():
            parameter.data += rank
        state.trainable, state.communication = parallel(state.model, CPU, "fp32", (2, torch.float32))
        assert [type(layer) for layer in state.model[1::2]] == [FactoredLinear, nn.Linear]
        backward(state, part(whole(n), rank, world))
        assert len(state.communication._waits) == 3  # two factors, and the other layer's gradient
        gradients.append(gradient(state.model))
    torch.set_num_threads(1 + rank)
    assert not factor_layers(plain_model(), 2, torch.float32)  # each would multiply in its own way
    torch.set_num_threads(1)
    return gradients


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    multiprocessing.set_forkserver_preload(["cifar_dist.train.loop"])  # imported once, not three times
    torch.multiprocessing.start_processes(in_groups, (folder,), 3, start_method="forkserver")
    return folder


@pytest.mark.parametrize("world", [2, 3])
def test_real_process_group_gives_the_same(world, groups):
    model = plain_model()
    every = [torch.load(groups / f"{rank}-of-{world}.pt", weights_only=True) for rank in range(world)]
    batch_mean = torch.stack([found["batchnorm"]["mean"] for found in every]).mean(0)
    for rank, found in enumerate(every):
        assert torch.allclose(found["batchnorm"]["found"], batch_mean, atol=1e-6)
        for i, n in enumerate((7, 2)):
            assert torch.allclose(found["gradients"][i], mean_gradient(model, whole(n)), atol=1e-6), (rank, n)
            assert torch.allclose(found["factored"][i], mean_gradient(model, whole(n)), atol=1e-6), (rank, n)
            assert torch.equal(found["factored"][i], every[0]["factored"][i])
            assert found["totals"][i].tolist() == pytest.approx(totals_of(model, whole(n)), rel=1e-6), (rank, n)
        mean = (world - 1) / 2
        assert found["layers"]["0.running_mean"].tolist() == [mean, 10]
        assert found["layers"]["0.running_var"].tolist() == [1 + mean] * 2
        assert found["layers"]["1.running_mean"].tolist() == [rank, 10]  # frozen: nobody moved it
        assert found["rows"].tolist() == [[other, 10, 1 + other, 1 + other] for other in range(world)]
        assert found["no_rows"].shape == (1, 0)


def test_sums_and_averages_without_a_group_change_nothing():
    totals, layer = torch.tensor([1.0, 2.0, 3.0]), KerasBatchNorm(2)
    layer.running_mean += 4
    average_batchnorm_over_ranks(layer)
    assert torch.equal(sum_over_ranks(totals), totals)
    assert layer.running_mean.tolist() == [4, 4]


# Another number of workers.

# The last of the seven batches has 2 images, which are never parted: of 3 workers two have none.
NUM_IMAGES, BATCH_SIZE, NUM_STEPS, NUM_EPOCHS, SEED = 44, 7, 7, 2, 3
FLIPS = ImageSpec(image_size=8, flips="both")
SETTINGS = {
    "adam": {"optimizer": "adam", "learning_rate": 0.01, "schedule": "cosine"},
    "sgd": {"learning_rate": 0.1, "momentum": 0.9, "clip_norm": 1.0, "accumulation_steps": 2},
}
END = Cursor(NUM_EPOCHS, 0)
# Name -> (number of workers, where they stop).
RUNS = {"straight": [(2, END)], "moved": [(2, Cursor(0, 3)), (1, Cursor(1, 2)), (3, END)]}


def conv_model() -> nn.Module:
    """No BatchNorm, whose statistics would depend on the split, and no dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, NUM_CLASSES))


def planned_batches(cursor: Cursor, rank: int, world: int) -> Iterator[Batch]:
    """A rank's parts of the rest of the epoch, flipped as they are planned."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_IMAGES, 3, 8, 8, generator=generator)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,), generator=generator)
    for plan in train_plans(
        np.arange(NUM_IMAGES),
        FLIPS,
        seed=SEED,
        epoch=cursor.epoch,
        first_step=cursor.step,
        global_batch_size=BATCH_SIZE,
        rank=rank,
        world=world,
    ):
        axes = [[axis for axis, wanted in zip((2, 1), pair, strict=True) if wanted] for pair in plan.augment.flips]
        flipped = torch.stack([images[i].flip(a) for i, a in zip(plan.ids, axes, strict=True)])
        yield Batch(
            images=flipped,
            labels=labels[plan.ids],
            ids=plan.ids,
            num_counted=plan.num_counted,
            global_size=plan.global_size,
            augment=plan.augment,
        )


def train_until(stop: Cursor, file: Path, rank: int, world: int, settings: dict) -> list[dict]:
    """Goes on from what is stored in `file`, if it is there, and stores what it has come to; returns what it saw."""
    state, steps = state_of(conv_model(), rank, world, NUM_STEPS, epochs=NUM_EPOCHS, seed=SEED, **settings), []
    if world > 1:
        state.trainable = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
    if file.exists():
        stored = torch.load(file, weights_only=True)
        state.model.load_state_dict(stored["model"])
        state.optimizers[0].load_state_dict(stored["optimizer"])
        state.cursor = Cursor(*stored["cursor"])
        state.totals += stored["totals"] * (rank == 0)

    def recorded(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            ids, flips = batch.ids[: batch.num_counted], batch.augment.flips[: batch.num_counted]
            steps.append({"cursor": list(state.cursor), "ids": ids.tolist(), "flips": flips.tolist()})
            yield batch

    while state.cursor < stop:
        last = stop.step if state.cursor.epoch == stop.epoch else NUM_STEPS
        batches = islice(planned_batches(state.cursor, rank, world), last - state.cursor.step)
        train_epoch(
            Step(state),
            recorded(batches),
            lambda _clock: steps[-1].update(totals=sum_over_ranks(state.totals).tolist()),
        )
        if state.cursor.step == NUM_STEPS:
            state.cursor = Cursor(state.cursor.epoch + 1, 0)
            state.totals.zero_()
    totals = sum_over_ranks(state.totals)
    if rank == 0:
        optimizer = state.optimizers[0].state_dict()
        stored = {"model": state.model.state_dict(), "optimizer": optimizer, "totals": totals}
        torch.save({**stored, "cursor": list(state.cursor)}, file)
    return steps


def in_runs(rank: int, folder: Path) -> None:
    """One process of all the groups of all runs, one after the other."""
    torch.set_num_threads(1)
    for name, settings in SETTINGS.items():
        for run_name, groups in RUNS.items():
            for i, (world, stop) in enumerate(groups):
                if rank < world:
                    place = folder / f"{name}-{run_name}"
                    rendezvous = f"file://{place}-{i}-rendezvous"
                    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
                    dist.barrier()  # rank 0 has stored what the group before it came to
                    steps = train_until(stop, place.with_suffix(".pt"), rank, world, settings)
                    torch.save(steps, f"{place}-{i}-{rank}.pt")
                    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    multiprocessing.set_forkserver_preload(["cifar_dist.train.loop"])
    torch.multiprocessing.start_processes(in_runs, (folder,), 3, start_method="forkserver")
    return folder


def global_steps(folder: Path, name: str, run_name: str) -> list[dict]:
    """What all ranks of a run saw: per step the ids and flips in the order of ranks, and the totals."""
    found = []
    for i, (world, _) in enumerate(RUNS[run_name]):
        parts = [torch.load(folder / f"{name}-{run_name}-{i}-{rank}.pt", weights_only=True) for rank in range(world)]
        for step in zip(*parts, strict=True):
            assert all((part["cursor"], part["totals"]) == (step[0]["cursor"], step[0]["totals"]) for part in step)
            sizes = [len(part["ids"]) for part in step]
            joined = {key: [x for part in step for x in part[key]] for key in ("ids", "flips")}
            found.append({**step[0], **joined, "sizes": sizes})
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_workers_that_come_and_go_train_as_if_nothing_had_happened(name, runs):
    """2 workers, then 1, then 3, against 2 all along: the same samples and flips, the same losses but for rounding."""
    straight, moved = (global_steps(runs, name, run_name) for run_name in RUNS)
    cursors = [[epoch, step] for epoch in range(NUM_EPOCHS) for step in range(NUM_STEPS)]
    for steps in (straight, moved):
        assert [step["cursor"] for step in steps] == cursors
        for epoch in range(NUM_EPOCHS):
            mine = [step for step in steps if step["cursor"][0] == epoch]
            ids = [i for step in mine for i in step["ids"]]
            assert ids == epoch_order(SEED, epoch, NUM_IMAGES).tolist()  # each once
            assert [f for step in mine for f in step["flips"]] == FLIPS.draw(SEED, epoch, np.array(ids)).flips.tolist()
            assert [step["totals"][2] for step in mine] == [7, 14, 21, 28, 35, 42, 44]
    assert [step["sizes"] for step in moved[:4]] == [[3, 4]] * 3 + [[7]]
    assert [step["sizes"] for step in moved[-2:]] == [[2, 2, 3], [2, 0, 0]]
    for one, other in zip(straight, moved, strict=True):
        assert (one["ids"], one["flips"]) == (other["ids"], other["flips"])
        assert one["totals"][0] == pytest.approx(other["totals"][0], rel=1e-5)
        assert one["totals"][1] == other["totals"][1]
    losses = [step["totals"][0] / step["totals"][2] for step in straight]
    assert losses[-1] < losses[NUM_STEPS - 1] - 0.1  # it learns, so each step shows in the next ones' losses
    ends = [torch.load(runs / f"{name}-{run_name}.pt", weights_only=True)["model"] for run_name in RUNS]
    for parameter, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][parameter], rtol=1e-4, atol=1e-5), parameter


# An epoch.


def run(state: TrainState, batches: Iterable[Batch]) -> Clock:
    return train_epoch(Step(state), batches, lambda _clock: None)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_each_batch_is_one_step_with_its_own_gradient():
    state, expected = state_of(plain_model(), learning_rate=0.1), plain_model()
    batches = [whole(6, seed=1), whole(6, seed=2), whole(3, seed=3)]
    for batch in batches:
        step = mean_gradient(expected, batch)
        torch.nn.utils.vector_to_parameters(weights(expected) - 0.1 * step, expected.parameters())
    clock = run(state, batches)
    assert torch.allclose(weights(state.model), weights(expected), atol=1e-6)
    assert state.cursor == Cursor(0, 3)
    assert (state.totals[2], clock.num_images) == (15, 15)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_limits_the_norm_of_the_global_gradient(precision):
    """fp16's scaled gradient must be unscaled first."""
    model = plain_model()
    free, clipped, loose = (
        state_of(copy.deepcopy(model), precision=precision, clip_norm=limit) for limit in (0.0, 0.05, 100.0)
    )
    for state in (free, clipped, loose):
        run(state, [whole(6)])
    steps = [weights(state.model) - weights(model) for state in (free, clipped, loose)]
    assert steps[0].norm() > 0.1
    assert torch.allclose(steps[1], steps[0] * 0.05 / steps[0].norm(), atol=1e-4)
    assert torch.allclose(steps[2], steps[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("limit", "clipped"), [(0.05, True), (1e3, False)])
def test_clipping_limits_the_norm_over_both_optimizers(limit, clipped, precision):
    """Muon's step has the same length at any gradient: what it and AdamW were given shows in their moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Linear(8, NUM_CLASSES))
    state = state_of(model, optimizer="muon", clip_norm=limit, precision=precision, momentum=0.75, beta1=0.75)
    before, scale = weights(model), state.precision.scaler.get_scale()
    backward(state, whole(6))
    kernel, *others = [p.grad / scale for p in model.parameters()]
    update(state)
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(weights(model)[:96], before[:96])
    muon, adamw = state.optimizers
    (matrix,) = muon.param_groups[0]["params"]
    moments = [
        muon.state[matrix]["momentum_buffer"],
        *(adamw.state[p]["exp_avg"] for p in list(model.parameters())[1:]),
    ]
    found = torch.cat([moment.flatten() / 0.25 for moment in moments])
    gradient = torch.cat([g.flatten() for g in (kernel, *others)])
    assert gradient.norm() > 0.1
    expected = gradient * limit / gradient.norm() if clipped else gradient
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_learning_rate_follows_the_schedule_of_the_whole_run():
    state = state_of(plain_model(), schedule="cosine", epochs=3)
    state.cursor = Cursor(1, 2)
    rates = []
    train_epoch(Step(state), [whole(2)] * 3, lambda _clock: rates.append(state.learning_rate))
    assert rates == [schedule_factor(state.config.optim, step, 15) for step in (7, 8, 9)]


def test_average_of_weights_is_updated_each_step():
    state, seen = state_of(plain_model(), ema_decay=0.1, learning_rate=0.1), []
    train_epoch(Step(state), [whole(4, seed) for seed in range(3)], lambda _clock: seen.append(weights(state.model)))
    expected = 0.1 * (0.1 * seen[0] + 0.9 * seen[1]) + 0.9 * seen[2]
    assert torch.allclose(weights(state.average.module), expected, atol=1e-6)


def test_callback_comes_after_each_step_when_all_of_it_is_done():
    state, seen = state_of(plain_model(), steps_per_epoch=3, epochs=2, learning_rate=0.1), []
    before = weights(state.model)

    def after_step(clock: Clock) -> None:
        moved = not torch.equal(weights(state.model), before)
        before.copy_(weights(state.model))
        seen.append((state.cursor, state.global_step, int(state.totals[2]), clock.num_images, moved))

    for epoch in range(2):
        state.cursor = Cursor(epoch, 0)
        train_epoch(Step(state), [whole(n, n) for n in (4, 3, 2)], after_step)
    assert seen == [
        *((Cursor(0, 1), 1, 4, 4, True), (Cursor(0, 2), 2, 7, 7, True), (Cursor(0, 3), 3, 9, 9, True)),
        *((Cursor(1, 1), 4, 13, 4, True), (Cursor(1, 2), 5, 16, 7, True), (Cursor(1, 3), 6, 18, 9, True)),
    ]


def test_epoch_that_was_over_takes_no_step():
    state = state_of(plain_model())
    state.cursor = Cursor(0, 5)
    before = weights(state.model)
    clock = train_epoch(Step(state), [], pytest.fail)
    assert torch.equal(weights(state.model), before)
    assert (state.cursor, clock.num_images) == (Cursor(0, 5), 0)


def dropout_model() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Flatten(), nn.Linear(12, 16), KerasBatchNorm(16), nn.Dropout(0.5), nn.Linear(16, NUM_CLASSES))
    return nn.Sequential(*parts)


def test_interrupted_epoch_ends_with_the_same_bits():
    """Dropout belongs to the cursor: a new process at step 2 draws what the old one would have drawn."""
    batches = [whole(6, seed) for seed in range(5)]
    straight = state_of(dropout_model(), optimizer="adam", learning_rate=0.01)
    run(straight, batches)
    first = state_of(dropout_model(), optimizer="adam", learning_rate=0.01)
    run(first, batches[:2])
    second = state_of(dropout_model(), optimizer="adam", learning_rate=0.01)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizers[0].load_state_dict(copy.deepcopy(first.optimizers[0].state_dict()))
    second.cursor = first.cursor
    torch.manual_seed(99)
    run(second, batches[2:])
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 1, "world": 2}])
def test_dropout_differs_by_seed_and_rank(change):
    batch = whole(6)
    states = [state_of(dropout_model(), world=change.get("world", 1)), state_of(dropout_model(), **change)]
    for state in states:
        run(state, [batch])
    assert not torch.equal(weights(states[0].model), weights(states[1].model))


def test_clock_counts_waiting_apart_from_working():
    def slow():
        for _ in range(3):
            time.sleep(0.05)
            yield whole(2)

    clock = Clock()
    for _ in clock.waiting(slow()):
        time.sleep(0.02)
    rates = clock.lap().rates()
    assert 0.15 <= clock.data_wait_seconds <= rates["seconds"] - 0.06 + 0.001
    assert rates["data_wait_share"] == pytest.approx(clock.data_wait_seconds / rates["seconds"], abs=0.01)
    assert rates["images_per_second"] == pytest.approx(6 / rates["seconds"], rel=0.05)


# Precision.


def test_auto_precision_on_a_cpu_is_bf16_where_it_has_instructions_for_it():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    expected = "bf16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "fp32"
    precision = Precision("auto", CPU)
    assert (precision.name, precision.scaler.is_enabled()) == (expected, False)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == precision.dtype


@pytest.mark.parametrize(("name", "scaled"), [("bf16", False), ("fp16", True)])
def test_half_precision_trains_close_to_fp32(name, scaled):
    exact, half = state_of(plain_model()), state_of(plain_model(), precision=name)
    seen = []
    half.model[1].register_forward_hook(lambda _m, _x, y: seen.append(y.dtype))
    for state in (exact, half):
        run(state, [whole(6)])
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[name]]
    assert half.precision.scaler.is_enabled() is scaled
    difference = (weights(half.model) - weights(exact.model)).abs().max()
    assert 0 < difference < 0.01
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_fp16_overflow_skips_the_step_and_lowers_the_scale():
    state = state_of(plain_model(), precision="fp16", optimizer="adam")
    before, scale = weights(state.model), state.precision.scaler.get_scale()
    bad = whole(4)
    bad.images.mul_(1e3)
    run(state, [bad])  # the scaled gradient is beyond fp16's largest value
    assert torch.equal(weights(state.model), before)
    assert state.precision.scaler.get_scale() == scale / 2
    state.precision.scaler.update(16.0)
    run(state, [whole(4)])
    assert not torch.equal(weights(state.model), before)


# Validation.


def test_validation_counts_every_image_in_inference_mode():
    model = dropout_model()
    model[2].running_mean += 0.5
    before = copy.deepcopy(model.state_dict())
    batches = [whole(4, 1), whole(4, 2), whole(3, 3)]
    model.train()
    found = validate(model, iter(batches), Precision("fp32", CPU)).tolist()
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.eval()
    expected = np.sum([totals_of(model, batch) for batch in batches], 0).tolist()
    assert found[1:] == expected[1:]
    assert found[0] == pytest.approx(expected[0])
    validate(model, batches, Precision("fp32", CPU))
    assert not model.training


def batchnorm_model() -> nn.Sequential:
    """A trained BatchNorm, dropout between it and a second one of another momentum, and a frozen one."""
    torch.manual_seed(0)
    first, second, frozen = KerasBatchNorm(16), KerasBatchNorm(8, momentum=0.8), KerasBatchNorm(8).requires_grad_(False)
    parts = (nn.Linear(12, 16), first, nn.Dropout(0.5), nn.Linear(16, 8), second, frozen, nn.Linear(8, NUM_CLASSES))
    return nn.Sequential(nn.Flatten(), *parts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_batches", [1, 3, 9])
def test_recalibration_takes_the_mean_over_batches_without_dropout(num_batches, training):
    model, batches = batchnorm_model().train(training), [whole(n, n) for n in (6, 4, 9, 7)]
    with torch.no_grad():
        model[2].weight.mul_(3)
        model[2].running_mean.add_(5)
    before = copy.deepcopy(model.state_dict())
    recalibrate_batchnorm(model, iter(batches), num_batches, Precision("fp32", CPU))
    expected: dict[str, list] = {
        name: [] for name in ("2.running_mean", "2.running_var", "5.running_mean", "5.running_var")
    }
    with torch.no_grad():
        for batch in batches[:num_batches]:
            x = model[1](batch.images.flatten(1))
            y = model[4]((x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt() * 3)
            statistics = (x.mean(0), x.var(0, correction=0), y.mean(0), y.var(0, correction=0))
            for values, found in zip(expected.values(), statistics, strict=True):
                values.append(found)
    for name, tensor in model.state_dict().items():
        wanted = torch.stack(expected[name]).mean(0) if name in expected else before[name]
        assert torch.allclose(tensor, wanted, rtol=1e-5, atol=1e-5 if name in expected else 0), name
    assert [model[i].momentum for i in (2, 5, 6)] == [0.99, 0.8, 0.99]
    assert {module.training for module in model.modules()} == {training}
    assert all(p.grad is None for p in model.parameters())


def test_validation_of_an_empty_part_is_zero():
    assert validate(plain_model(), [], Precision("fp32", CPU)).tolist() == [0, 0, 0]


# Moving statistics.


def with_drawn_statistics(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return model


def test_statistics_are_the_trained_layers_own_by_their_names_in_the_state_dict():
    model = batchnorm_model()
    found, stored = statistics_of(model), model.state_dict()
    assert list(found) == ["2.running_mean", "2.running_var", "5.running_mean", "5.running_var"]
    assert all(tensor.data_ptr() == stored[name].data_ptr() for name, tensor in found.items())


def test_statistics_go_into_another_model_and_nothing_else_does():
    model, other = with_drawn_statistics(batchnorm_model()), batchnorm_model()
    row = gather_statistics(model)
    assert row.shape == (1, 2 * (16 + 8))
    assert torch.equal(row[0], torch.cat(list(statistics_of(model).values())))
    before, expected = copy.deepcopy(other.state_dict()), statistics_of(model)
    set_statistics(other, row[0])
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected.get(name, before[name])), name


def test_split_row_completes_a_state_dict_and_belongs_to_nobody():
    model, row = batchnorm_model(), torch.arange(48.0)
    before, values = copy.deepcopy(model.state_dict()), split_statistics(model, row)
    assert values["2.running_mean"].tolist() == list(range(16))
    assert values["5.running_var"].tolist() == list(range(40, 48))
    other = batchnorm_model()
    other.load_state_dict(dict(model.state_dict()) | values)
    assert torch.equal(gather_statistics(other)[0], row)
    for tensor in values.values():
        tensor.fill_(-1)
    assert torch.equal(row, torch.arange(48.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("length", [0, 47, 49])
def test_row_of_another_model_is_refused(length):
    model = with_drawn_statistics(batchnorm_model())
    before = gather_statistics(model)
    with pytest.raises(RuntimeError):
        set_statistics(model, torch.zeros(length))
    assert torch.equal(gather_statistics(model), before)


@pytest.mark.parametrize("model", [plain_model(), batchnorm_model().requires_grad_(False)])
def test_model_without_trained_batchnorm_has_no_statistics(model):
    before = copy.deepcopy(model.state_dict())
    row = gather_statistics(model)
    assert (statistics_of(model), row.shape, split_statistics(model, row[0])) == ({}, (1, 0), {})
    set_statistics(model, row[0])
    average_batchnorm_over_ranks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_average_of_weights_has_statistics_of_its_own():
    model = with_drawn_statistics(batchnorm_model())
    average = average_of(model, Config().replace(ema_decay=0.5).optim)
    assert list(statistics_of(average)) == [f"module.{name}" for name in statistics_of(model)]
    assert list(statistics_of(average.module)) == list(statistics_of(model))
    mine, row = gather_statistics(model), torch.arange(48.0)
    set_statistics(average.module, row)
    assert torch.equal(gather_statistics(average)[0], row)
    assert torch.equal(gather_statistics(model), mine)
