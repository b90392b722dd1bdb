"""What a checkpoint holds; write, verify, load, keep.

A checkpoint is the folder RUN/checkpoints/epoch-EEEE-step-SSSSSS-attempt-AAAA: model.safetensors (average.safetensors
beside it), ranks.safetensors (what each rank has of its own), optimizer.pt and, written last, meta.json, which names
the SHA-256 of the others, of itself, and of the run's log up to here. A folder without meta.json is no checkpoint.
"""

import errno
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import is_texts
from cifar_dist.storage import file_sha256, sync

if TYPE_CHECKING:  # the driver's plan reads meta.json only, and does not wait for torch
    import torch


FORMAT_VERSION = 4
NAME = re.compile(r"epoch-\d{4,}-step-\d{6,}(-attempt-(\d{4,}))?")  # format 2 had no attempt
NEEDED = {"model.safetensors", "optimizer.pt"}
FILES = NEEDED | {"average.safetensors", "ranks.safetensors"}


class Damaged(UserError):
    """A checkpoint that cannot be read; the one before it may be."""


class Mark(NamedTuple):
    """A place in the run's log: its bytes so far and their SHA-256 (hex)."""

    num_bytes: int
    sha256: str


class Cursor(NamedTuple):
    """The position in the data stream: epochs completed and steps completed in the current one."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint at rest. `meta` is its meta.json."""

    name: str
    meta: dict[str, Any]

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.meta["epoch"], self.meta["step"])

    @property
    def age(self) -> tuple[int, Cursor]:
        """Newer ones are greater: a later attempt has gone on from what was whole when it started."""
        return self.meta["attempt"], self.cursor

    @property
    def score(self) -> tuple[float, float]:
        """For `best`: validation accuracy, then the lower loss. Checkpoints inside an epoch have none."""
        metrics = self.meta["metrics"]
        if not metrics:
            return -1.0, 0.0
        accuracy, loss = metrics["validation_accuracy"], metrics["validation_loss"]
        if accuracy is None or loss is None:  # it was not finite: worse than anything
            return -math.inf, -math.inf
        return accuracy, -loss


@dataclass(frozen=True)
class State:
    """What a checkpoint holds beside meta.json, on any device.

    ranks: [world, n] each, by the name of the model that the rows belong to. log: the place in the run's log.
    """

    model: Mapping[str, "torch.Tensor"]
    average: Mapping[str, "torch.Tensor"] | None
    ranks: Mapping[str, "torch.Tensor"]
    optimizer: dict[str, Any]
    log: Mark | None = None


def name_of(cursor: Cursor, attempt: int) -> str:
    return f"epoch-{cursor.epoch:04d}-step-{cursor.step:06d}-attempt-{attempt:04d}"


def check_meta(meta: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError for a meta.json that no job wrote, whoever sealed it."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float)

    needed: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("epoch", "step", "attempt", "global_step"), lambda v: type(v) is int and v >= 0),
        **dict.fromkeys(("model", "manifest_sha256"), lambda v: type(v) is str),
        "world_size": lambda v: type(v) is int and v > 0,
        "config": lambda v: type(v) is dict and all(type(section) is dict for section in v.values()),
        "files": lambda v: NEEDED <= v.keys() <= FILES,
        "log": lambda v: v is None or (v.keys() == {"num_bytes", "sha256"} and type(v["num_bytes"]) is int),
        "metrics": lambda v: (
            v is None
            or all(v[name] is None or is_number(v[name]) for name in ("validation_accuracy", "validation_loss"))
        ),
    }
    others: dict[str, Callable[[Any], bool]] = {
        "weights": lambda v: v is None or {"uri", "sha256", "is_imagenet"} <= v.keys(),
        "class_names": is_texts,
        "totals": lambda v: len(v) == 3 and all(map(is_number, v)),
        **dict.fromkeys(("num_averaged", "num_train", "num_threads_per_worker"), is_number),
    }
    for key, is_right in (needed | {key: others[key] for key in others.keys() & meta.keys()}).items():
        if not is_right(meta[key]):
            raise ValueError(f"{key} is not as this program writes it")


def check_optimizer(state: Any) -> None:
    """Raises an exception for what is no state of optimizers."""
    if state.keys() != {"optimizers", "scaler"} or type(state["optimizers"]) is not list:
        raise ValueError("optimizers")
    if not all(type(one) is dict for one in (state["scaler"], *state["optimizers"])):
        raise ValueError("scaler or optimizers")


def best_first(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda c: (c.score, c.age), reverse=True)


def write_files(state: State, folder: Path) -> dict[str, str]:
    """Writes the state's files; returns their SHA-256 by name. Raises OSError, with the number where it is known."""
    import torch  # noqa: PLC0415
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {"model": state.model, "average": state.average, "ranks": state.ranks}
    names = [f"{stem}.safetensors" for stem, values in tensors.items() if values]
    for name in names:
        host = {key: t.detach().cpu().contiguous() for key, t in (tensors[name.split(".")[0]] or {}).items()}
        try:
            save_file(host, folder / name)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EINVAL, str(error)) from error
    try:
        with open(folder / "optimizer.pt", "wb") as file:  # of Python: torch's own does not say what went wrong
            torch.save(state.optimizer, file)
    except RuntimeError as error:  # torch's complaint that the file is not whole
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    names.append("optimizer.pt")
    for name in names:
        sync(folder / name)
    return {name: file_sha256(folder / name) for name in names}


def read_state_file(path: Path) -> Any:
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    if path.suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings():  # of the pickle's protocol: what is not ours is refused in our own words
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
