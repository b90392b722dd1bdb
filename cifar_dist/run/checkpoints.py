"""The checkpoints of a run: write, verify, load, keep."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, is_sealed, seal, to_json
from cifar_dist.storage import Folder, here
from cifar_dist.uris import join_uri
from cifar_dist.versions import MODEL_CHANGES, MODEL_VERSIONS, package_versions

if TYPE_CHECKING:  # the driver's plan reads meta.json only, and does not wait for torch
    pass
from cifar_dist.run.checkpoint import (
    FORMAT_VERSION,
    NAME,
    Checkpoint,
    Cursor,
    Damaged,
    Mark,
    State,
    best_first,
    check_meta,
    check_optimizer,
    name_of,
    read_state_file,
    write_files,
)


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
