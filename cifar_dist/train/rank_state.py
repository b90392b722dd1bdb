"""Converts a rank's state to and from checkpoints."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState
from cifar_dist.run.folder import Run
from cifar_dist.train.loop import sum_over_ranks
from cifar_dist.train.moving_statistics import gather_statistics, set_statistics, split_statistics
from cifar_dist.train.optim import load_optimizer
from cifar_dist.train.state import TrainState


def models_of(state: TrainState) -> dict[str, torch.nn.Module]:
    """Returns the model and, if the run has one, the average of its weights, by name."""
    return {"model": state.model, **({} if state.average is None else {"average": state.average.module})}


def gather_rows(state: TrainState) -> dict[str, torch.Tensor]:
    """Returns all ranks' moving statistics, float32 [world, n], by model name. All ranks call it."""
    return {name: gather_statistics(model) for name, model in models_of(state).items()}


def finite_totals(state: TrainState, latest: Callable[[], Checkpoint | None]) -> list[float]:
    """Returns the epoch's totals over all ranks. Raises UserError on every rank if the loss is not finite.

    `latest` waits for pending writes and returns the newest checkpoint, for the message.
    """
    totals = sum_over_ranks(state.totals).tolist()
    if not math.isfinite(totals[0]):
        raise divergence("the training loss", state, latest())
    return totals


def check_weights(state: TrainState, latest: Callable[[], Checkpoint | None]) -> None:
    """Raises UserError if a weight is not finite."""
    if not math.isfinite(get_total_norm([p.detach() for p in state.model.parameters()])):
        raise divergence("a weight", state, latest())


def divergence(subject: str, state: TrainState, kept: Checkpoint | None) -> UserError:
    good = f"its last good checkpoint {kept.name} is kept" if kept else "it had no checkpoint yet"
    return UserError(
        f"{subject} became infinite or not a number by step {state.global_step}; the run stopped, {good}. Lower "
        "--learning-rate, set --clip-norm, or use another --precision, under another --name"
    )


def checkpoint_state(state: TrainState, rows: dict[str, torch.Tensor]) -> CheckpointState:
    """Returns the contents of a checkpoint, on the state's device. Models get the ranks' mean of the statistics."""
    models = {n: dict(m.state_dict()) | split_statistics(m, rows[n].mean(0)) for n, m in models_of(state).items()}
    ranks = {name: values for name, values in rows.items() if state.world > 1 and values.numel()}
    optimizers = [optimizer.state_dict() for optimizer in state.optimizers]
    optimizer = {"optimizers": optimizers, "scaler": state.precision.scaler.state_dict()}
    return CheckpointState(model=models["model"], average=models.get("average"), ranks=ranks, optimizer=optimizer)


def checkpoint_meta(state: TrainState, totals: list[float], metrics: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the fields of meta.json that describe a rank's state."""
    return {
        "global_step": state.global_step,
        "metrics": metrics,
        "totals": totals,
        "num_averaged": int(state.average.n_averaged) if state.average is not None else 0,
        "config": state.config.to_dict(),
        "precision": state.precision.name,
        "device": torch.cuda.get_device_name(state.device) if state.device.type == "cuda" else "cpu",
        "world_size": state.world,
        "num_threads_per_worker": state.num_threads,
    }


def restore(state: TrainState, checkpoint: Checkpoint, loaded: CheckpointState, where: str) -> None:
    """Loads a checkpoint into the state. Raises UserError if it does not fit. `where`: its location, for messages."""
    meta = checkpoint.meta
    try:
        state.model.load_state_dict(loaded.model)
        if state.average is not None:
            state.average.module.load_state_dict(loaded.average or {})
            state.average.n_averaged.fill_(meta["num_averaged"])
        for optimizer, stored in zip(state.optimizers, loaded.optimizer["optimizers"], strict=True):
            load_optimizer(optimizer, stored)
        state.precision.scaler.load_state_dict(loaded.optimizer["scaler"])
        if meta["world_size"] == state.world:  # otherwise all ranks start from the mean of the statistics
            for name, rows in loaded.ranks.items():
                set_statistics(models_of(state)[name], rows[state.rank].to(state.device))
            if state.config.loop.deterministic:
                state.num_threads = meta["num_threads_per_worker"]
                torch.set_num_threads(state.num_threads)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"the checkpoint {where} does not fit the network and optimizer of this run "
            f"({str(error).splitlines()[0]}); use another --name"
        ) from error
    state.cursor = checkpoint.cursor
    if state.rank == 0:  # the others start from zero: only the sum over ranks is used
        state.totals += torch.tensor(meta["totals"], dtype=torch.float64, device=state.device)


Found = tuple[Checkpoint, CheckpointState]


def agree_on_checkpoint(state: TrainState, found: Found | None, run: Run, expect: dict[str, Any]) -> Found | None:
    """Returns the newest checkpoint that every rank can read, or None if the run has no checkpoint.

    `found` is this rank's newest checkpoint. Raises UserError if the ranks see different storage, or compute in
    different precisions.
    """
    ages: list[Any] = [None] * state.world
    own_newest = (found[0].age, found[0].name) if found else None
    dist.all_gather_object(ages, (own_newest, state.precision.name))
    ages, precisions = (list(values) for values in zip(*ages, strict=True))
    if len(set(precisions)) > 1:
        raise UserError(f"the workers' processors differ: --precision auto means {set(precisions)}; name one of them")
    if None in ages and any(ages):
        raise UserError(
            f"the workers do not see the same checkpoints in {run.uri}; is the storage shared by all nodes?"
        )
    if found is None:
        return None
    common = min(ages)[1]
    if found[0].name != common:
        checkpoint = next(c for c in run.checkpoints.all() if c.name == common)
        found = checkpoint, run.checkpoints.load(checkpoint, expect)
    return found
