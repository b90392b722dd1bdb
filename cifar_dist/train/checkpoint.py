"""What a checkpoint holds; write, verify, load, keep.

A checkpoint is the folder RUN/checkpoints/epoch-EEEE-step-SSSSSS-attempt-AAAA: model.safetensors (average.safetensors
beside it), ranks.safetensors (what each rank has of its own), optimizer.pt and, written last, meta.json, which names
the SHA-256 of the others, of itself, and of the run's log up to here. A folder without meta.json is no checkpoint.
"""

import contextlib
import errno
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, file_sha256, from_json, here, is_sealed, is_texts, join_uri, seal, sync, to_json
from cifar_dist.versions import MODEL_CHANGES, MODEL_VERSIONS, package_versions

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


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_uri: str, retry_seconds: float = 0.0) -> None:
        self.folder = Folder(join_uri(run_uri, "checkpoints"), retry_seconds)

    def _names(self) -> list[str]:
        """The folders that write() made; other things beside them are nobody's business here."""
        return [name for name in self.folder.names() if NAME.fullmatch(name)]

    def scan(self) -> tuple[list[Checkpoint], dict[str, Damaged]]:
        """(every whole checkpoint, oldest first; name -> what is wrong with it). What was cut off is neither."""
        found, damaged = [], {}
        for name in self._names():
            where = self.where(name)
            try:
                meta = from_json(self.folder.read(f"{name}/meta.json"))
                if meta["format_version"] != FORMAT_VERSION:
                    version = f"format version {meta['format_version']}, this program reads {FORMAT_VERSION}"
                    damaged[name] = Damaged(f"{where} has {version}; use another --name, or that program")
                    continue
                checkpoint = Checkpoint(name, meta)
                check_meta(meta)  # an error here, not later
                if not is_sealed(meta):
                    damaged[name] = Damaged(f"{where}/meta.json does not match its own checksum; remove that folder")
                    continue
                if name != name_of(checkpoint.cursor, meta["attempt"]):
                    raise KeyError("epoch, step or attempt")
                found.append(checkpoint)
            except FileNotFoundError:
                continue  # cut off while it was written
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                damaged[name] = Damaged(f"{where}/meta.json is damaged ({error!r}); remove that folder")
        return sorted(found, key=lambda c: c.age), damaged

    def all(self) -> list[Checkpoint]:
        """Every whole checkpoint, oldest first. Raises Damaged if there are none but damaged ones."""
        found, damaged = self.scan()
        if damaged and not found:
            raise next(iter(damaged.values()))
        return found

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.all()), None)

    def best(self) -> Checkpoint | None:
        """The one with the best validation accuracy; the latest if none was validated."""
        return next(iter(best_first(self.all())), None)

    def where(self, name: str) -> str:
        return join_uri(self.folder.uri, name)

    def check_version(self, checkpoint: Checkpoint) -> None:
        """Raises UserError for weights of another version of the network, with which this one would compute another
        function."""
        model = checkpoint.meta["model"]
        made, own = checkpoint.meta.get("model_version", 1), MODEL_VERSIONS.get(model)
        if made != own:
            raise UserError(
                f"{self.where(checkpoint.name)} holds version {made} of the network {model}, this program computes "
                f"version {own}{MODEL_CHANGES.get(model, '')}: the weights do not belong to it; train it again under "
                "another --name"
            )

    def write(
        self, cursor: Cursor, attempt: int, state: State, meta: dict[str, Any], fence: Callable[[], None] = lambda: None
    ) -> Checkpoint:
        """Writes a checkpoint; it exists from the moment its meta.json does. `fence` raises where it must not."""
        name = name_of(cursor, attempt)
        fence()
        self.folder.delete(f"{name}/meta.json")
        self.folder.create(name)
        with tempfile.TemporaryDirectory() as temporary:
            # On a local file system straight into the checkpoint's folder, elsewhere by way of a local file.
            target = Path(self.folder.at(name)) if self.folder.is_local else Path(temporary)
            try:
                if self.folder.is_local:
                    hashes = self.folder.tried("write", name, lambda: write_files(state, target))
                else:
                    with here(target / name):
                        hashes = write_files(state, target)
            except UserError:
                with contextlib.suppress(UserError):  # what is left goes with the next checkpoint
                    self.folder.delete(name)
                raise
            if not self.folder.is_local:
                for file in hashes:
                    self.folder.upload(target / file, f"{name}/{file}")
        fence()
        whole = {
            "format_version": FORMAT_VERSION,
            "model_version": MODEL_VERSIONS.get(meta["model"]),
            "epoch": cursor.epoch,
            "step": cursor.step,
            "attempt": attempt,
            "packages": package_versions(),
            "files": hashes,
            "log": state.log._asdict() if state.log else None,
            **meta,
        }
        whole = json.loads(to_json(seal(whole)))  # as it will be read
        self.folder.write(f"{name}/meta.json", to_json(whole))
        return Checkpoint(name, whole)

    def keep(self, num_newest: int, attempt: int) -> None:
        """Deletes all but the newest ones and the best one, and what attempts up to `attempt` left unfinished.

        Damaged ones, and those of another version of this program, are left to whoever can read them.
        """
        found, damaged = self.scan()
        names = {c.name for c in [*found[-num_newest:], *best_first(found)[:1]]} | damaged.keys()
        for name in self._names():
            match = NAME.fullmatch(name)
            if match and name not in names and int(match[2] or 0) <= attempt:
                if not self.folder.is_link(name):  # what a link leads to is another run's
                    self.folder.delete(f"{name}/meta.json")
                self.folder.delete(name)

    def load_newest(
        self, expect: Mapping[str, Any], note: Callable[[str, str], None] = lambda *_: None
    ) -> tuple[Checkpoint, State] | None:
        """The newest checkpoint that can be read; None if there are none at all.

        `note` is told (name, what is wrong) of those passed over and (name, '') of the one that is loaded. Raises
        Damaged if none can be read, UserError for one of another model or data set.
        """
        found, damaged = self.scan()
        for name, error in damaged.items():
            note(name, str(error))
        for checkpoint in reversed(found):
            try:
                state = self.load(checkpoint, expect)
            except Damaged as error:
                damaged[checkpoint.name] = error
                note(checkpoint.name, str(error))
                continue
            note(checkpoint.name, "")
            return checkpoint, state
        if damaged:
            *_, last = damaged.values()
            raise Damaged(f"no checkpoint of the run can be read: {last}, or use another --name to start again")
        return None

    def load(self, checkpoint: Checkpoint, expect: Mapping[str, Any] | None = None, optimizer: bool = True) -> State:
        """The checkpoint's tensors, on the CPU, verified.

        Raises Damaged if a file is missing, does not match its SHA-256 or was not written by this program, and
        UserError if meta.json differs from `expect` (the model, the data set) or names another version of the network.
        Nothing is unpickled but tensors and plain values, and only after its checksum held.
        """
        where = self.where(checkpoint.name)
        for key, value in (expect or {}).items():
            if checkpoint.meta.get(key) != value:
                made = checkpoint.meta.get(key)
                raise UserError(f"{where} was made with {key} {made!r}, this run has {value!r}; use another --name")
        self.check_version(checkpoint)
        loaded: dict[str, Any] = {"average": None, "ranks": {}, "optimizer": {}}
        with tempfile.TemporaryDirectory() as temporary:
            for file, sha256 in checkpoint.meta["files"].items():
                if file == "optimizer.pt" and not optimizer:
                    continue
                path = Path(temporary) / Path(file).name
                try:
                    found = self.folder.download(f"{checkpoint.name}/{file}", path)
                except FileNotFoundError:
                    raise Damaged(f"the checkpoint {where} is damaged: it lacks {file}; remove that folder") from None
                if found != sha256:
                    raise Damaged(
                        f"the checkpoint {where} is damaged: {file} does not match its checksum; remove that folder"
                    )
                try:
                    loaded[file.split(".")[0]] = read_state_file(path)
                    if file == "optimizer.pt":
                        check_optimizer(loaded["optimizer"])
                except OSError:
                    raise
                except Exception as error:  # a forged file makes the unpickler fail in any way
                    raise Damaged(
                        f"{file} of the checkpoint {where} was not written by this program; remove that folder"
                    ) from error
                path.unlink()
        log = checkpoint.meta.get("log")
        return State(**loaded, log=Mark(**log) if log else None)


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
