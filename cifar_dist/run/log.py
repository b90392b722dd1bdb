"""A run's log: metrics.jsonl and TensorBoard events, both append-only.

A checkpoint holds the log's Mark: its length and SHA-256 at that time. A resume cuts the log at the Mark, so that log
and weights match. Object stores cannot append, so there the log continues in further files: metrics-OFFSET.jsonl.
"""

import hashlib
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import Mark
from cifar_dist.sealed_json import finite, from_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

LOG = "metrics.jsonl"
PART = re.compile(r"metrics-(\d{15})\.jsonl")
PART_BYTES = 4 << 20  # on object stores, the most that a flush writes again
FLUSH_SECONDS = 10.0
WARNING = b'"kind": "warning"'


class Taken(NamedTuple):
    """The lines and events since the last take, which any thread may store, and the log's Mark after them."""

    lines: bytes
    events: bytes
    mark: Mark


class Appended:
    """An append-only file of a run. `name_of(offset)` names the part that starts at that byte. Local files have one
    part."""

    def __init__(self, run: Folder, name_of: Callable[[int], str], content: bytes = b"") -> None:
        """Starts a new file with `content`, so that a process with the old file open cannot write into it."""
        self.run, self.name_of = run, name_of
        self.file: int | None = None
        self.num_before, self.part = 0, b""
        if run.is_local:
            self.num_before = len(content)
            run.write(name_of(0), content)
            self.file = os.open(run.at(name_of(0)), os.O_WRONLY)
        else:
            self.append(content)

    def append(self, content: bytes) -> None:
        """Appends `content`. A retried write puts the same bytes at the same offset."""
        if self.file is None:
            if self.part and len(self.part) + len(content) > PART_BYTES:
                self.num_before, self.part = self.num_before + len(self.part), b""
            self.part += content
            self.run.write(self.name_of(self.num_before), self.part)
        elif content:
            self.run.tried("write", self.name_of(0), lambda: self._write_at(content))
            self.num_before += len(content)

    def _write_at(self, content: bytes) -> None:
        assert self.file is not None
        done = 0
        while done < len(content):
            done += os.pwrite(self.file, content[done:], self.num_before + done)
        os.fsync(self.file)

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


class RunLog:
    """The log of a run that resumes at `global_step`. `mark`: from the checkpoint that it resumes from, else None.

    Each line is a JSON object with `kind` (step, epoch, warning or samples), `epoch`, `global_step` and measured
    values. If the stored log does not match the mark, it is kept under another name, and a new log begins. `lost` then
    holds the reason. `warnings`: the kinds of warnings in the log.
    """

    def __init__(self, run: Folder, global_step: int, mark: Mark | None = None) -> None:
        self.run = run
        self.run.create("tensorboard")
        content, self.lost = self._restored(mark)
        self._digest, self._num_bytes, self._lines = hashlib.sha256(content), len(content), bytearray()
        self.warnings = {json.loads(line)["warning"] for line in content.splitlines() if WARNING in line}
        parts = [name for name in self.run.names() if PART.fullmatch(name)]
        self._log = Appended(self.run, part_name, content)
        for name in parts:  # the first file now holds their content
            self.run.delete(name)
        with tempfile.TemporaryDirectory(prefix="cifar_dist-events-") as folder:
            from tensorboardX.event_file_writer import EventsWriter  # noqa: PLC0415 - imports torch, which readers need not
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415

            # Not SummaryWriter: it writes in a thread, and its flush does not wait for the thread.
            self._writer = EventsWriter(f"{folder}/events", f".{global_step}")
            self._writer.write_event(Event(step=global_step + 1, session_log=SessionLog(status=SessionLog.START)))
            self._writer.flush()
            (path,) = Path(folder).iterdir()
            self._written = path.open("rb")  # the name is deleted next, so that a killed process leaves no file
        name = f"tensorboard/{path.name}.{uuid.uuid4().hex[:8]}"
        self._events = Appended(self.run, lambda offset: f"{name}.{offset:015d}" if offset else name)
        self._taken_at = time.monotonic()

    def _restored(self, mark: Mark | None) -> tuple[bytes, str]:
        """Returns (the stored log up to the mark, the fault of the stored log or '')."""
        content = read_log(self.run)
        kept = content[: mark.num_bytes] if mark else b""
        fault = ""
        if mark and (len(kept) < mark.num_bytes or hashlib.sha256(kept).hexdigest() != mark.sha256):
            aside = f"{LOG}.damaged-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
            fault = (
                f"{join_uri(self.run.uri, LOG)} is not the log that the checkpoint was written with; a new one begins"
            )
            if content:
                self.run.write(aside, content)
                fault += f", and what was there is in {aside}"
            kept = b""
        return kept, fault

    def add(self, kind: str, epoch: int, global_step: int, **values: Any) -> None:
        line = finite({"kind": kind, "epoch": epoch, "global_step": global_step, **values})
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        self._digest.update(content)
        self._num_bytes += len(content)
        self._lines += content
        if kind == "warning":
            self.warnings.add(values["warning"])
        from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415 - as in __init__
        from tensorboardX.summary import scalar  # noqa: PLC0415

        for name, value in values.items():
            if isinstance(value, int | float):
                summary = scalar(f"{kind}/{name}", value)
                self._writer.write_event(Event(wall_time=time.time(), step=global_step, summary=summary))

    @property
    def is_due(self) -> bool:
        """Whether the last take was more than FLUSH_SECONDS ago."""
        return time.monotonic() - self._taken_at > FLUSH_SECONDS

    def take(self) -> Taken:
        """Returns the lines and events since the last take. The caller must store all takes, in order."""
        self._writer.flush()
        self._taken_at = time.monotonic()
        taken = Taken(bytes(self._lines), self._written.read(), Mark(self._num_bytes, self._digest.hexdigest()))
        self._lines.clear()
        return taken

    def store(self, taken: Taken) -> None:
        """Appends the lines and events of a take."""
        self._log.append(taken.lines)
        self._events.append(taken.events)

    def close(self) -> None:
        """Closes the files, including the local copy of the events."""
        self._writer.close()
        self._written.close()
        self._log.close()
        self._events.close()


def part_name(offset: int) -> str:
    return f"metrics-{offset:015d}.jsonl" if offset else LOG


def read_log(run: Folder) -> bytes:
    """Returns the whole log, empty if the run has none."""
    try:
        content = run.read(LOG)
    except FileNotFoundError:
        return b""
    for name in run.names():
        match = PART.fullmatch(name)
        if match and int(match[1]) <= len(content):  # else left over from an interrupted resume
            content = content[: int(match[1])] + run.read(name)
    return content


def read_lines(run: Folder) -> list[dict[str, Any]]:
    """Returns the lines of a run's log, none if the run has no log. Raises UserError if the log is damaged.

    Leaves out an incomplete last line, which an interrupted write left.
    """
    complete, _, _ = read_log(run).rpartition(b"\n")
    try:
        lines = [from_json(line) for line in complete.split(b"\n") if line]
        if not all(type(line.get("kind")) is str and type(line.get("global_step")) is int for line in lines):
            raise ValueError("a line lacks its kind or global_step")
        return lines
    except ValueError as error:
        raise UserError(f"{join_uri(run.uri, LOG)} is damaged ({error}); mend or remove it") from error
