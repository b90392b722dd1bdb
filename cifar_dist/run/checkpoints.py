"""The checkpoints of a run: write, verify, load, keep."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cifar_dist.errors import UserError
from cifar_dist.models.spec import MODELS
from cifar_dist.run.checkpoint import (
    FORMAT_VERSION,
    NAME,
    Checkpoint,
    CheckpointState,
    Cursor,
    Damaged,
    Mark,
    Score,
    best_first,
    check_meta,
    check_optimizer,
    name_of,
    read_state_file,
    write_files,
)
from cifar_dist.sealed_json import from_json, is_sealed, seal, to_json
from cifar_dist.storage import Folder, here
from cifar_dist.uris import join_uri
from cifar_dist.versions import package_versions


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, run_uri: str, retry_seconds: float = 0.0) -> None:
        self.folder = Folder(join_uri(run_uri, "checkpoints"), retry_seconds)

    def _names(self) -> list[str]:
        """Returns the names of folders that write() made, and ignores other entries."""
        return [name for name in self.folder.names() if NAME.fullmatch(name)]

    def scan(self) -> tuple[list[Checkpoint], dict[str, Damaged]]:
        """Returns (complete checkpoints, oldest first; faults by name). Interrupted writes are in neither."""
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
                check_meta(meta)  # before anything uses the fields
                if not is_sealed(meta):
                    damaged[name] = Damaged(f"{where}/meta.json does not match its own checksum; remove that folder")
                    continue
                if name != name_of(checkpoint.cursor, meta["attempt"]):
                    raise KeyError("epoch, step or attempt")
                found.append(checkpoint)
            except FileNotFoundError:
                continue  # the write was interrupted
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                damaged[name] = Damaged(f"{where}/meta.json is damaged ({error!r}); remove that folder")
        return sorted(found, key=lambda c: c.age), damaged

    def all(self) -> list[Checkpoint]:
        """Returns complete checkpoints, oldest first. Raises Damaged if all checkpoints are damaged."""
        found, damaged = self.scan()
        if damaged and not found:
            raise next(iter(damaged.values()))
        return found

    def latest(self) -> Checkpoint | None:
        return next(reversed(self.all()), None)

    def best(self) -> Checkpoint | None:
        """Returns the checkpoint with the best validation accuracy, or the latest if none was validated."""
        return next(iter(best_first(self.all())), None)

    def best_score(self, newest: Checkpoint) -> Score:
        """Returns the best score up to the checkpoint `newest`. Newer ones could not be read and come again."""
        return max(checkpoint.score for checkpoint in self.all() if checkpoint.age <= newest.age)

    def where(self, name: str) -> str:
        return join_uri(self.folder.uri, name)

    def check_version(self, checkpoint: Checkpoint) -> None:
        """Raises UserError if the weights belong to another version of the network, which computes another function."""
        model = checkpoint.meta["model"]
        made, spec = checkpoint.meta.get("model_version", 1), MODELS.get(model)
        own, change = (spec.version, spec.change) if spec else (None, "")
        if made != own:
            raise UserError(
                f"{self.where(checkpoint.name)} holds version {made} of the network {model}, this program computes "
                f"version {own}{change}: the weights do not belong to it; train it again under "
                "another --name"
            )

    def write(
        self,
        cursor: Cursor,
        attempt: int,
        state: CheckpointState,
        meta: dict[str, Any],
        fence: Callable[[], None] = lambda: None,
    ) -> Checkpoint:
        """Writes a checkpoint, which exists once its meta.json does. `fence` raises if the run was taken over."""
        name = name_of(cursor, attempt)
        fence()
        self.folder.delete(f"{name}/meta.json")
        self.folder.create(name)
        with tempfile.TemporaryDirectory() as temporary:
            # A local file system is written directly, other storage by uploading a local file.
            target = Path(self.folder.at(name)) if self.folder.is_local else Path(temporary)
            try:
                if self.folder.is_local:
                    hashes = self.folder.tried("write", name, lambda: write_files(state, target))
                else:
                    with here(target / name):
                        hashes = write_files(state, target)
            except UserError:
                with contextlib.suppress(UserError):  # the next checkpoint deletes what is left
                    self.folder.delete(name)
                raise
            if not self.folder.is_local:
                for file in hashes:
                    self.folder.upload(target / file, f"{name}/{file}")
        fence()
        whole = {
            "format_version": FORMAT_VERSION,
            "model_version": MODELS[meta["model"]].version if meta["model"] in MODELS else None,
            "epoch": cursor.epoch,
            "step": cursor.step,
            "attempt": attempt,
            "packages": package_versions(),
            "files": hashes,
            "log": state.log._asdict() if state.log else None,
            **meta,
        }
        whole = json.loads(to_json(seal(whole)))  # the values that a reader gets
        self.folder.write(f"{name}/meta.json", to_json(whole))
        return Checkpoint(name, whole)

    def keep(self, num_newest: int, attempt: int) -> None:
        """Deletes all checkpoints but the `num_newest` and the best, and unfinished ones of attempts up to `attempt`.

        Keeps damaged checkpoints and those of other versions of this program.
        """
        found, damaged = self.scan()
        names = {c.name for c in [*found[-num_newest:], *best_first(found)[:1]]} | damaged.keys()
        for name in self._names():
            match = NAME.fullmatch(name)
            if match and name not in names and int(match[2] or 0) <= attempt:
                if not self.folder.is_link(name):  # the target of a link belongs to another run
                    self.folder.delete(f"{name}/meta.json")
                self.folder.delete(name)

    def load_newest(
        self, expect: Mapping[str, Any], note: Callable[[str, str], None] = lambda *_: None
    ) -> tuple[Checkpoint, CheckpointState] | None:
        """Loads the newest checkpoint that can be read. Returns None if the run has no checkpoints.

        Calls `note` with (name, fault) for each checkpoint passed over and (name, '') for the loaded checkpoint.
        Raises Damaged if no checkpoint can be read, and UserError for a checkpoint of another model or data set.
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

    def load(
        self, checkpoint: Checkpoint, expect: Mapping[str, Any] | None = None, optimizer: bool = True
    ) -> CheckpointState:
        """Returns the checkpoint's verified contents, with tensors on the CPU.

        Raises Damaged if a file is missing, does not match its SHA-256 or was not written by this program. Raises
        UserError if meta.json differs from `expect` (model, data set) or names another version of the network.
        Unpickles only tensors and plain values, and only from files whose SHA-256 matches.
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
                except Exception as error:  # a forged file can make the unpickler raise anything
                    raise Damaged(
                        f"{file} of the checkpoint {where} was not written by this program; remove that folder"
                    ) from error
                path.unlink()
        log = checkpoint.meta.get("log")
        return CheckpointState(**loaded, log=Mark(**log) if log else None)
