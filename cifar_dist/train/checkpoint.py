"""What a checkpoint holds; write, verify, load, keep.

A checkpoint is the folder RUN/checkpoints/epoch-EEEE-step-SSSSSS: model.safetensors (and average.safetensors),
optimizer.pt and, written last, meta.json, which names the SHA-256 of the others. A folder without meta.json is no
checkpoint.
"""

import json
import pickle
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyarrow import fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, file_sha256, join_uri, to_json

FORMAT_VERSION = 2
NAME = re.compile(r"epoch-\d{4,}-step-\d{6,}")


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
    def score(self) -> tuple[float, float]:
        """For `best`: validation accuracy, then the lower loss. Checkpoints inside an epoch have none."""
        metrics = self.meta["metrics"]
        return (metrics["validation_accuracy"], -metrics["validation_loss"]) if metrics else (-1.0, 0.0)


def package_versions() -> dict[str, str]:
    names = ("torch", "ray", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "pyarrow", "numpy", "cifar-dist")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # one of the two DALI builds, or run from a folder without being installed
            continue
    return found


def best_first(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    return sorted(checkpoints, key=lambda c: (c.score, c.cursor), reverse=True)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_uri: str) -> None:
        self.folder = Folder(join_uri(run_uri, "checkpoints"))

    def _names(self) -> list[str]:
        """The folders that write() made; other things beside them are nobody's business here."""
        return [name for name in self.folder.names() if NAME.fullmatch(name)]

    def all(self) -> list[Checkpoint]:
        """Every whole checkpoint, oldest first. Raises UserError for one with a damaged meta.json."""
        found = []
        for name in self._names():
            try:
                meta = json.loads(self.folder.read(f"{name}/meta.json"))
                if meta["format_version"] != FORMAT_VERSION:
                    raise UserError(
                        f"{self.where(name)} has format version {meta['format_version']}, not {FORMAT_VERSION}"
                    )
                checkpoint = Checkpoint(name, meta)
                _ = checkpoint.cursor, checkpoint.score, meta["files"]  # a KeyError here, not later
                found.append(checkpoint)
            except FileNotFoundError:
                continue  # cut off while it was written
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.where(name)}/meta.json is damaged; remove that folder") from error
        return found

    def latest(self) -> Checkpoint | None:
        return max(self.all(), key=lambda c: c.cursor, default=None)

    def best(self) -> Checkpoint | None:
        """The one with the best validation accuracy; the latest if none was validated."""
        return next(iter(best_first(self.all())), None)

    def where(self, name: str) -> str:
        return join_uri(self.folder.uri, name)

    def write(
        self,
        cursor: Cursor,
        model: Mapping[str, torch.Tensor],
        average: Mapping[str, torch.Tensor] | None,
        optimizer: dict[str, Any],
        meta: dict[str, Any],
    ) -> Checkpoint:
        """Writes a checkpoint; it exists from the moment its meta.json does."""
        name = f"epoch-{cursor.epoch:04d}-step-{cursor.step:06d}"
        self.folder.delete(f"{name}/meta.json")
        self.folder.create(name)
        with tempfile.TemporaryDirectory() as temporary:
            # On a local file system straight into the checkpoint's folder, elsewhere by way of a local file.
            local = isinstance(self.folder.fs, fs.LocalFileSystem)
            target = Path(self.folder.at(name)) if local else Path(temporary)
            hashes = {}
            try:
                for file, tensors in {"model": model, "average": average}.items():
                    if tensors is not None:
                        host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                        save_file(host, target / f"{file}.safetensors")
                        hashes[f"{file}.safetensors"] = file_sha256(target / f"{file}.safetensors")
                torch.save(optimizer, target / "optimizer.pt")
            except (OSError, RuntimeError, SafetensorError) as error:
                raise UserError(f"cannot write the checkpoint {self.where(name)}: {error}") from error
            hashes["optimizer.pt"] = file_sha256(target / "optimizer.pt")
            if not local:
                for file in hashes:
                    self.folder.upload(target / file, f"{name}/{file}")
        whole = {
            "format_version": FORMAT_VERSION,
            "epoch": cursor.epoch,
            "step": cursor.step,
            "packages": package_versions(),
            "files": hashes,
            **meta,
        }
        self.folder.write(f"{name}/meta.json", to_json(whole))
        return Checkpoint(name, whole)

    def keep(self, num_newest: int) -> None:
        """Deletes all but the newest ones and the best one, and what was cut off while it was written."""
        found = sorted(self.all(), key=lambda c: c.cursor)
        names = {c.name for c in [*found[-num_newest:], *best_first(found)[:1]]}
        for name in self._names():
            if name not in names:
                self.folder.delete(f"{name}/meta.json")
                self.folder.delete(name)

    def load(
        self, checkpoint: Checkpoint, expect: Mapping[str, Any] | None = None, optimizer: bool = True
    ) -> dict[str, Any]:
        """{'model': state, 'average': state or None, 'optimizer': state}, all on the CPU, verified.

        Raises UserError if a file is missing or does not match its SHA-256, or if meta.json differs from `expect` (the
        model, the data set). Nothing is unpickled but tensors and plain values, and only after its checksum held.
        """
        where = self.where(checkpoint.name)
        for key, value in (expect or {}).items():
            if checkpoint.meta.get(key) != value:
                raise UserError(f"{where} was made with {key} {checkpoint.meta.get(key)!r}, this run has {value!r}")
        loaded: dict[str, Any] = {"average": None}
        with tempfile.TemporaryDirectory() as temporary:
            for file, sha256 in checkpoint.meta["files"].items():
                if file == "optimizer.pt" and not optimizer:
                    continue
                path = Path(temporary) / Path(file).name
                try:
                    found = self.folder.download(f"{checkpoint.name}/{file}", path)
                except FileNotFoundError:
                    raise UserError(
                        f"the checkpoint {where} lacks {file}; remove that folder to go on without it"
                    ) from None
                if found != sha256:
                    raise UserError(
                        f"the checkpoint {where} is damaged: {file} does not match its checksum; remove that folder "
                        "to go on from the one before"
                    )
                try:
                    is_weights = file.endswith(".safetensors")
                    state = load_file(path) if is_weights else torch.load(path, map_location="cpu", weights_only=True)
                except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
                    raise UserError(
                        f"{file} of the checkpoint {where} was not written by this program; remove that folder"
                    ) from error
                loaded[file.split(".")[0]] = state
                path.unlink()
        return loaded
