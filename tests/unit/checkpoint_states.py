"""States of a small made-up run for the tests of checkpoints and savers, and how two are compared."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cifar_dist.run.checkpoint import Checkpoint, CheckpointState, Cursor, Mark
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.sealed_json import seal

EXPECT = {"model": "fan", "num_classes": 10, "manifest_sha256": "abc"}


def weights(value: float) -> dict[str, torch.Tensor]:
    # A transposed and a scalar tensor: neither lies in memory as safetensors wants it.
    return {"a.weight": torch.arange(6.0).view(2, 3).T + value, "a.steps": torch.tensor(value, dtype=torch.float64)}


def optimizer_state(value: float = 1.0) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.full((3,), float(value)))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.tensor([1.0, -2.0, 3.0]) * value
    optimizer.step()
    return {"optimizers": [optimizer.state_dict()], "scaler": {"scale": 8.0}}


def state(value: float) -> CheckpointState:
    """With everything that a checkpoint may hold; all of it depends on `value`."""
    return CheckpointState(
        model=weights(value),
        average=weights(value + 0.5),
        ranks={"model": torch.arange(8.0).view(2, 4) * value, "average": torch.full((2, 4), float(value))},
        optimizer=optimizer_state(value),
        log=Mark(int(100 * value), f"{int(value):064x}"),
    )


def meta_of(score: tuple[float, float] | None = None, **changed: Any) -> dict[str, Any]:
    metrics = score and {"validation_accuracy": score[0], "validation_loss": score[1]}
    return {**EXPECT, "metrics": metrics, "world_size": 1, "config": {}, "global_step": 0, **changed}


def write(
    checkpoints: Checkpoints, epoch: int, step: int = 0, score: tuple | None = None, attempt: int = 1, **changed: Any
) -> Checkpoint:
    """Writes state(epoch); `changed` goes into meta.json."""
    return checkpoints.write(Cursor(epoch, step), attempt, state(epoch), meta_of(score, **changed))


def without_log(whole: CheckpointState) -> CheckpointState:
    """A saver puts in the mark of its own log."""
    return replace(whole, log=None)


def put_meta(path: Path, meta: dict[str, Any]) -> None:
    """Writes a meta.json with the right checksum of its own, as whoever can write the folder can."""
    path.write_text(json.dumps(seal(meta)))


def same(a: object, b: object) -> bool:
    """Whether they are equal, each tensor and its dtype."""
    if isinstance(a, CheckpointState) and isinstance(b, CheckpointState):
        return same(vars(a), vars(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a local folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
