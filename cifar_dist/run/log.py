"""A run's record: metrics.jsonl and TensorBoard events, to which is only ever appended.

A checkpoint holds the log's Mark, the length and SHA-256 that it had by then: a resume cuts the log there, so that it
fits the weights. On object stores, which cannot append, a file goes on in others beside it: metrics-OFFSET.jsonl.
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

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from cifar_dist.errors import UserError
from cifar_dist.run.checkpoint import Mark
from cifar_dist.sealed_json import finite, from_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

LOG = "metrics.jsonl"
PART = re.compile(r"metrics-(\d{15})\.jsonl")
PART_BYTES = 4 << 20  # on object stores, of what is written again with each flush
FLUSH_SECONDS = 10.0
WARNING = b'"kind": "warning"'


class Taken(NamedTuple):
    """What has come since the last take, to be stored in any thread, and the place behind it."""

    lines: bytes
    events: bytes
    mark: Mark


class Appended:
    """A file of a run that grows. `name_of(offset)` names the part from this byte on; a local file has one part."""

    def __init__(self, run: Folder, name_of: Callable[[int], str], content: bytes = b"") -> None:
        """Begins with `content` in a new file: a process that still has an older one open cannot write into it."""
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
        """Stores more; a write that is tried again writes the same bytes to the same place."""
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
    """Lines of a run that goes on at `global_step` behind `mark`, that of the checkpoint from which it resumes.

    Each line is a JSON object with `kind` (step, epoch, warning or samples), `epoch`, `global_step` and what was
    measured. `lost` says what is wrong with the stored log where it is not the one that the mark means: then it is put
    aside, and a new one begins. `warnings` are the kinds that the log holds.
    """

    def __init__(self, run_uri: str, global_step: int, mark: Mark | None = None, retry_seconds: float = 0.0) -> None:
        self.run = Folder(run_uri, retry_seconds)
        self.run.create("tensorboard")
        content, self.lost = self._restored(mark)
        self._digest, self._num_bytes, self._lines = hashlib.sha256(content), len(content), bytearray()
        self.warnings = {json.loads(line)["warning"] for line in content.splitlines() if WARNING in line}
        parts = [name for name in self.run.names() if PART.fullmatch(name)]
        self._log = Appended(self.run, part_name, content)
        for name in parts:  # all that is kept of them is in the first file now
            self.run.delete(name)
        with tempfile.TemporaryDirectory(prefix="cifar_dist-events-") as folder:
            # Not SummaryWriter: it writes from a thread, and its flush does not wait for that.
            self._writer = EventsWriter(f"{folder}/events", f".{global_step}")
            self._writer.write_event(Event(step=global_step + 1, session_log=SessionLog(status=SessionLog.START)))
            self._writer.flush()
            (path,) = Path(folder).iterdir()
            self._written = path.open("rb")  # without a name from here on, so that a killed process leaves nothing
        name = f"tensorboard/{path.name}.{uuid.uuid4().hex[:8]}"
        self._events = Appended(self.run, lambda offset: f"{name}.{offset:015d}" if offset else name)
        self._taken_at = time.monotonic()

    def _restored(self, mark: Mark | None) -> tuple[bytes, str]:
        """(the log up to the mark, what is wrong with it)."""
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
        for name, value in values.items():
            if isinstance(value, int | float):
                summary = scalar(f"{kind}/{name}", value)
                self._writer.write_event(Event(wall_time=time.time(), step=global_step, summary=summary))

    @property
    def is_due(self) -> bool:
        """Whether the lines were last taken FLUSH_SECONDS ago."""
        return time.monotonic() - self._taken_at > FLUSH_SECONDS

    def take(self) -> Taken:
        """The lines and events since the last time: all that is taken must be stored, in that order."""
        self._writer.flush()
        self._taken_at = time.monotonic()
        taken = Taken(bytes(self._lines), self._written.read(), Mark(self._num_bytes, self._digest.hexdigest()))
        self._lines.clear()
        return taken

    def store(self, taken: Taken) -> None:
        """Appends what was taken."""
        self._log.append(taken.lines)
        self._events.append(taken.events)

    def close(self) -> None:
        """Closes the files, and with them the local copy of the events."""
        self._writer.close()
        self._written.close()
        self._log.close()
        self._events.close()


def part_name(offset: int) -> str:
    return f"metrics-{offset:015d}.jsonl" if offset else LOG


def read_log(run: Folder) -> bytes:
    """The whole log, empty if there is none."""
    try:
        content = run.read(LOG)
    except FileNotFoundError:
        return b""
    for name in run.names():
        match = PART.fullmatch(name)
        if match and int(match[1]) <= len(content):  # else a resume that was cut off has left it
            content = content[: int(match[1])] + run.read(name)
    return content


def read_lines(run: Folder) -> list[dict[str, Any]]:
    """The lines of a run's log; none if there is no such file. Raises UserError for a damaged one.

    What is behind the last line's end was cut off while it was written, and is left out.
    """
    whole, _, _ = read_log(run).rpartition(b"\n")
    try:
        lines = [from_json(line) for line in whole.split(b"\n") if line]
        if not all(type(line.get("kind")) is str and type(line.get("global_step")) is int for line in lines):
            raise ValueError("a line lacks its kind or global_step")
        return lines
    except ValueError as error:
        raise UserError(f"{join_uri(run.uri, LOG)} is damaged ({error}); mend or remove it") from error
