"""Converts a rank's state to and from checkpoints."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm

from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState
from cifar_dist.train.loop import sum_over_ranks
from cifar_dist.train.moving_statistics import gather_statistics, set_statistics, split_statistics
from cifar_dist.train.optim import load_optimizer
from cifar_dist.train.state import TrainState
from cifar_dist.train.trees import mapped


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
    check_loss(totals[0], state.global_step, latest)
    return totals


def check_loss(loss: float, global_step: int, latest: Callable[[], Checkpoint | None]) -> None:
    """Raises UserError if the training loss up to a step is not finite. `latest`: as for `finite_totals`."""
    if not math.isfinite(loss):
        raise divergence("the training loss", global_step, latest())


def check_weights(state: TrainState, latest: Callable[[], Checkpoint | None]) -> None:
    """Raises UserError if a weight is not finite."""
    if not math.isfinite(get_total_norm([p.detach() for p in state.model.parameters()])):
        raise divergence("a weight", state.global_step, latest())


def divergence(subject: str, global_step: int, kept: Checkpoint | None) -> UserError:
    good = f"its last good checkpoint {kept.name} is kept" if kept else "it had no checkpoint yet"
    return UserError(
        f"{subject} became infinite or not a number by step {global_step}; the run stopped, {good}. Lower "
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


def check_precision(state: TrainState) -> None:
    """Raises UserError on every rank if the ranks compute in different precisions."""
    precisions: list[Any] = [None] * state.world
    dist.all_gather_object(precisions, state.precision.name)
    if len(set(precisions)) > 1:
        raise UserError(f"the workers' processors differ: --precision auto means {set(precisions)}; name one of them")


Found = tuple[Checkpoint, CheckpointState]


def found_by_rank_zero(found: Found | None, state: TrainState) -> Found | None:
    """Returns rank 0's checkpoint on every rank, or None if it has none. All ranks call it."""
    whole = {"name": found[0].name, "meta": found[0].meta, **vars(found[1])} if found else None
    whole = from_rank_zero(whole, state)
    if state.rank == 0:
        return found
    if whole is None:
        return None
    checkpoint = Checkpoint(whole.pop("name"), whole.pop("meta"))
    return checkpoint, CheckpointState(**whole)


class SentTensor(NamedTuple):
    """Stands for a tensor that rank 0 sends on its own: the number in the order of sending, shape and dtype."""

    number: int
    shape: torch.Size
    dtype: torch.dtype


def from_rank_zero(tree: Any, state: TrainState) -> Any:
    """Returns rank 0's nested dicts, lists and plain values. Their tensors are on the state's device on other ranks.

    All ranks call it; `tree` counts on rank 0 only. So one rank reads a checkpoint from storage, and not all."""
    if state.world == 1:
        return tree
    tensors: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> SentTensor:
        tensors.append(tensor)
        return SentTensor(len(tensors) - 1, tensor.shape, tensor.dtype)

    described = [mapped(tree, torch.Tensor, put) if state.rank == 0 else None]
    dist.broadcast_object_list(described, 0)

    def take(place: SentTensor) -> torch.Tensor:
        if state.rank == 0:
            tensor = tensors[place.number].to(state.device).contiguous()
        else:
            tensor = torch.empty(place.shape, dtype=place.dtype, device=state.device)
        dist.broadcast(tensor, 0)
        return tensor

    received = mapped(described[0], SentTensor, take)
    return tree if state.rank == 0 else received
