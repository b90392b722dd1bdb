"""Where the batches of an Arrow stream lie, so that a reader passes over those that it does not need.

pyarrow reads a message with all its bytes. The few numbers that say how long it is are taken from its head here:
a table of the format Flatbuffers, whose fields are found through a list of their offsets."""

import mmap
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

CONTINUED = b"\xff\xff\xff\xff"  # begins a message
MOST_HEAD = 64 << 20  # bytes of a message's head, which is held in memory
SCHEMA, BATCH = 1, 3  # kinds of messages


class Batch(NamedTuple):
    """A record batch: its rows, its place and length in the file, and its head's."""

    first_row: int
    num_rows: int
    at: int
    head: bytes
    num_bytes: int
    buffers: tuple[tuple[int, int], ...]  # (place behind the head, length)
    is_compressed: bool


class FlatTable:
    """A table of Flatbuffers at a place in bytes."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at
        self._offsets = at - self.number("<i", at)
        self._size = self.number("<H", self._offsets)

    def number(self, kind: str, at: int) -> int:
        if at < 0:
            raise OSError("a message's head is damaged")
        (value,) = struct.unpack_from(kind, self.content, at)
        return value

    def place(self, field: int) -> int:
        """Returns where a field is, 0 if it is not there."""
        slot = 4 + 2 * field
        offset = self.number("<H", self._offsets + slot) if slot < self._size else 0
        return self.at + offset if offset else 0

    def value(self, field: int, kind: str) -> int:
        place = self.place(field)
        return self.number(kind, place) if place else 0

    def target(self, field: int) -> int:
        """Returns the place that a field names."""
        place = self.place(field)
        return place + self.number("<I", place) if place else 0


def batches_of(file: Any, start: int, is_all: bool) -> list[Batch] | None:
    """Returns the batches of a stream that begins at `start`; None if they cannot be read one by one.

    is_all: the stream ends where the file does. Raises OSError if it is damaged."""
    try:
        return list(walked(file, start, is_all))
    except struct.error as error:
        raise OSError("a message's head is damaged") from error
    except NotAlone:
        return None


class NotAlone(Exception):
    """A batch needs what other messages hold: dictionaries. Or the file is of a format before 2019."""


def walked(file: Any, at: int, is_all: bool) -> Iterator[Batch]:
    size, row = file.size(), 0
    while at < size:
        file.seek(at)
        start = file.read(4096)  # mostly the whole head: remote storage answers slowly
        if start[:4] != CONTINUED:
            raise NotAlone
        (length,) = struct.unpack_from("<i", start, 4)
        if length == 0:
            if is_all and at + 8 < size:
                raise OSError("it holds data behind its end")
            return
        if not 0 < length < MOST_HEAD:
            raise OSError("a message's head is damaged")
        head = start[: 8 + length] + file.read(max(0, 8 + length - len(start)))
        message = FlatTable(head, 8 + struct.unpack_from("<I", head, 8)[0])
        kind, body = message.value(1, "<B"), message.value(3, "<q")
        if kind not in (SCHEMA, BATCH):
            raise NotAlone
        if body < 0 or at + len(head) + body > size:
            raise OSError("its end is missing")
        if kind == BATCH:
            table = FlatTable(head, message.target(2))
            first, num_rows = table.target(2), table.value(0, "<q")
            num = table.number("<I", first)
            numbers = struct.unpack_from(f"<{2 * num}q", head, first + 4)
            buffers = tuple(zip(numbers[::2], numbers[1::2], strict=True))
            yield Batch(row, num_rows, at, head, len(head) + body, buffers, table.place(3) != 0)
            row += num_rows
        at += len(head) + body


def num_buffers(kind: pa.DataType) -> int | None:
    """Returns how many buffers a column has; None for types that are not known here."""
    types = pa.types
    if types.is_struct(kind):
        inner = [num_buffers(kind.field(i).type) for i in range(kind.num_fields)]
        return None if None in inner else 1 + sum(filter(None, inner))
    if types.is_list(kind) or types.is_large_list(kind):
        inner_list = num_buffers(kind.value_type)
        return None if inner_list is None else 2 + inner_list
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return 3
    return 2 if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) else None


def buffers_of(schema: pa.Schema, name: str) -> slice | None:
    """Returns which buffers of a batch are those of a column; None if that is not known."""
    column, first = schema.get_field_index(name), 0
    for i, field in enumerate(schema):
        num = num_buffers(field.type)
        if num is None:
            return None
        if i == column:
            return slice(first, first + num)
        first += num
    return None


def read_batch(file: Any, batch: Batch, schema: pa.Schema, only: slice | None = None) -> pa.RecordBatch:
    """Reads a batch. With `only`, all buffers but these stay zeros, which take no memory."""
    if only is None or batch.is_compressed:
        file.seek(batch.at)
        content: Any = file.read(batch.num_bytes)
    else:
        content = mmap.mmap(-1, batch.num_bytes)
        content[: len(batch.head)] = batch.head
        for start, length in batch.buffers[only]:
            at = len(batch.head) + start
            if start < 0 or length < 0 or at + length > batch.num_bytes:
                raise OSError("a message's head is damaged")
            file.seek(batch.at + at)
            content[at : at + length] = file.read(length).ljust(length, b"\0")
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(content)), schema)
