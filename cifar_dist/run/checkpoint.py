"""The contents of a checkpoint, and functions that check, write and read its files.

A checkpoint is the folder RUN/checkpoints/epoch-EEEE-step-SSSSSS-attempt-AAAA. It holds model.safetensors, if averaged
average.safetensors, ranks.safetensors (each rank's BatchNorm statistics) and optimizer.pt. meta.json, written last,
holds the SHA-256 of these files, of itself and of the run's log so far. A folder without meta.json is no checkpoint.
"""

import errno
import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import is_texts
from cifar_dist.storage import file_sha256, sync

if TYPE_CHECKING:  # the driver's plan reads only meta.json and need not wait for torch
    import torch


FORMAT_VERSION = 4
NAME = re.compile(r"epoch-\d{4,}-step-\d{6,}(-attempt-(\d{4,}))?")  # format 2 had no attempt number
NEEDED = {"model.safetensors", "optimizer.pt"}
FILES = NEEDED | {"average.safetensors", "ranks.safetensors"}


class Damaged(UserError):
    """A checkpoint that cannot be read. An earlier checkpoint may be readable."""


class Mark(NamedTuple):
    """A position in the run's log: the number of bytes before it and their SHA-256 (hex)."""

    num_bytes: int
    sha256: str


class Cursor(NamedTuple):
    """The position in the data stream: epochs completed, and steps completed in the current epoch."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """A complete stored checkpoint. `meta` is its meta.json."""

    name: str
    meta: dict[str, Any]

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.meta["epoch"], self.meta["step"])

    @property
    def age(self) -> tuple[int, Cursor]:
        """Sort key. A later attempt is newer, because it resumed from the newest complete checkpoint."""
        return self.meta["attempt"], self.cursor

    @property
    def score(self) -> "Score":
        return score_of(self.meta["metrics"])


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The contents of a checkpoint without meta.json, on any device.

    ranks: the ranks' moving statistics, [world, n], by model name. log: the position in the run's log.
    """

    model: Mapping[str, "torch.Tensor"]
    average: Mapping[str, "torch.Tensor"] | None
    ranks: Mapping[str, "torch.Tensor"]
    optimizer: dict[str, Any]
    log: Mark | None = None


Score = tuple[float, float]


def score_of(metrics: Mapping[str, Any] | None) -> Score:
    """Returns the sort key of `best`: (validation accuracy, minus validation loss).

    A checkpoint within an epoch, without metrics, ranks below all others. One whose loss is not finite ranks lowest."""
    if not metrics:
        return -1.0, 0.0
    accuracy, loss = metrics["validation_accuracy"], metrics["validation_loss"]
    if accuracy is None or loss is None or not math.isfinite(loss):  # None: not finite, as stored
        return LOWEST
    return accuracy, -loss


LOWEST: Score = (-math.inf, -math.inf)


def name_of(cursor: Cursor, attempt: int) -> str:
    return f"epoch-{cursor.epoch:04d}-step-{cursor.step:06d}-attempt-{attempt:04d}"


def check_meta(meta: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError for a meta.json that no job wrote, even if its checksum is right."""

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
        "precision": lambda v: v in ("fp32", "bf16", "fp16"),
        "totals": lambda v: len(v) == 3 and all(map(is_number, v)),
        **dict.fromkeys(("num_averaged", "num_train", "num_threads_per_worker"), is_number),
    }
    for key, is_right in (needed | {key: others[key] for key in others.keys() & meta.keys()}).items():
        if not is_right(meta[key]):
            raise ValueError(f"{key} is not as this program writes it")


def check_optimizer(state: Any) -> None:
    """Raises an exception if `state` is no state of optimizers."""
    if state.keys() != {"optimizers", "scaler"} or type(state["optimizers"]) is not list:
        raise ValueError("optimizers")
    if not all(type(one) is dict for one in (state["scaler"], *state["optimizers"])):
        raise ValueError("scaler or optimizers")


def best_first(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda c: (c.score, c.age), reverse=True)


def write_files(state: CheckpointState, folder: Path) -> dict[str, str]:
    """Writes the state's files; returns their SHA-256 by name. Raises OSError, with its errno if known."""
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
        with open(folder / "optimizer.pt", "wb") as file:  # a Python file: torch's own files do not report the OSError
            hashed = Hashed(file)
            torch.save(state.optimizer, hashed)  # type: ignore[arg-type]
    except RuntimeError as error:  # torch reports an incomplete file and hides the OSError
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    for name in [*names, "optimizer.pt"]:
        sync(folder / name)
    return {name: file_sha256(folder / name) for name in names} | {"optimizer.pt": hashed.digest.hexdigest()}


class Hashed:
    """A file that is open for writing, with the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)


def read_state_file(path: Path) -> Any:
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    if path.suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings():  # torch.load warns about foreign pickles; our own error follows anyway
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
