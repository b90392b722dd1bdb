"""Reads the rows of tables of pictures: Parquet files and Arrow files. A part is read without the rows before it.

In a row group of Parquet, however, pages are decoded from its first row on: pyarrow passes over none."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.sources.arrow_messages import Batch, batches_of, buffers_of, read_batch
from cifar_dist.data.sources.names import suffix_of
from cifar_dist.data.sources.source import Content, Read
from cifar_dist.data.sources.trees import Tree
from cifar_dist.errors import UserError, first_line

ROWS_AT_ONCE = 32
FILE_MARK = b"ARROW1\0\0"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's format of streams
BUFFER = 1 << 20  # bytes read at once: without it, a whole row group is


@dataclass(frozen=True)
class TableReader:
    """Reads items that are rows of tables: `file` numbers `files` and their `columns` of pictures, `at` is the row.

    files: name, size, place in the tree."""

    tree: Tree
    files: tuple[tuple[str, int, int], ...]
    columns: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        return self.tree.is_shared

    @property
    def identity(self) -> str:
        return repr(self)

    def reads(self, items: pa.Table) -> Iterator[Read]:
        numbers, rows, changed = (items[name].to_numpy() for name in ("file", "at", "changed"))
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        start = 0
        for end in filter(None, ends):
            yield from self._of_file(int(numbers[start]), rows[start:end], int(changed[start]))
            start = end

    def _of_file(self, number: int, rows: np.ndarray, changed: int) -> Iterator[Read]:
        place, column = self.files[number], self.columns[number]
        where = self.tree.where(place[0])
        num_found = 0
        with opened(self.tree, place) as table:
            if isinstance(table, ArrowTable):
                table.places = places_of(self.tree, place, changed)  # type: ignore[arg-type]  # trees are frozen
            for first, batch in table.batches(column, rows):
                chosen = rows[(rows >= first) & (rows < first + len(batch))]
                num_found += len(chosen)
                for row in chosen.tolist():
                    yield partial(content_of, batch, row - first, f"{where} row {row}", row)
        if num_found < len(rows):
            raise UserError(f"{where} holds fewer rows than it says; copy it again")


def content_of(column: Any, at: int, where: str, row: int) -> Content:
    """Returns a row's picture. Does not follow paths to files outside the table."""
    try:
        value = column[at].as_py()
    except ValueError as error:
        raise UserError(f"{where} cannot be read: its path is not UTF-8; store it as UTF-8") from error
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        raise UserError(f"{where} names the file {path} and holds no bytes; store the pictures in the table")
    return Content(data or b"", path or f"row-{row}", where)


class ParquetTable:
    """A Parquet file, read in small parts."""

    def __init__(self, file: Any) -> None:
        self.file = pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        self.schema = self.file.schema_arrow
        groups = [self.file.metadata.row_group(i) for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        self._groups = groups

    def column(self, name: str) -> Any:
        return self.file.read([name])[name]

    def sizes(self, name: str) -> np.ndarray:
        """Returns the mean bytes of a picture of each row's group, int64 [n]."""
        means = []
        for group in self._groups:
            chunks = [group.column(i) for i in range(group.num_columns)]
            total = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == name)
            means.append(total // max(group.num_rows, 1))
        return np.repeat(np.array(means, np.int64), np.diff(self.starts))

    def batches(self, name: str, rows: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yields (first row, values) of parts that hold the rows."""
        for group in np.unique(np.searchsorted(self.starts, rows, "right") - 1).tolist():
            first, last = int(self.starts[group]), int(rows[rows < self.starts[group + 1]][-1])
            for batch in self.file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[name]):
                yield first, batch.column(0)
                first += len(batch)
                if first > last:
                    break


class ArrowTable:
    """An Arrow file as `save_to_disk` writes it: a stream, or the other format, a stream between two marks."""

    def __init__(self, file: Any) -> None:
        self._file = file if isinstance(file, pa.NativeFile) else pa.PythonFile(file, "r")
        self._is_file = self._file.read(6) == b"ARROW1"
        self._file.seek(0)
        self._reader = pa.ipc.open_file(self._file) if self._is_file else pa.ipc.open_stream(self._file)
        self.schema = self._reader.schema
        self.places: list[Batch] | None = None  # None: not looked for, or batches cannot be read one by one

    def find_places(self) -> list[Batch] | None:
        """Finds the batches. Raises OSError if the end is missing, or is not where the file ends."""
        if not self._is_file:
            self._file.seek(max(0, self._file.size() - len(END_OF_STREAM)))
            if self._file.read() != END_OF_STREAM:  # Arrow takes the end of the file for that of the stream
                raise OSError("its end is missing")
        self.places = batches_of(self._file, len(FILE_MARK) if self._is_file else 0, is_all=not self._is_file)
        return self.places

    def labels_and_sizes(self, label: str, image: str) -> tuple[Any, np.ndarray]:
        """Returns the labels, and the mean bytes of a picture of each row's batch, int64 [n]. Reads no pictures."""
        labels, sizes = [], []
        of_image, of_label = buffers_of(self.schema, image), buffers_of(self.schema, label)
        places = self.find_places()
        if of_image and of_label and places is not None:
            for place in places:
                column = sound(read_batch(self._file, place, self.schema, of_label).column(label))
                labels.append(column.take(pa.array(range(len(column)), pa.int64())))  # a copy, without the batch
                num_bytes = sum(length for _, length in place.buffers[of_image])
                sizes.append(np.full(place.num_rows, num_bytes // max(place.num_rows, 1), np.int64))
        else:
            for batch in self._every():
                labels.append(sound(batch.column(label)))
                sizes.append(np.full(len(batch), batch.column(image).nbytes // max(len(batch), 1), np.int64))
        kind = self.schema.field(label).type
        return pa.chunked_array(labels, kind), np.concatenate([np.zeros(0, np.int64), *sizes])

    def batches(self, name: str, rows: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Yields (first row, values) of batches that hold the rows."""
        if self.places is not None:
            for place in self.places:
                if np.searchsorted(rows, place.first_row) < np.searchsorted(rows, place.first_row + place.num_rows):
                    yield place.first_row, sound(read_batch(self._file, place, self.schema).column(name))
            return
        first = 0
        for batch in self._every():
            yield first, sound(batch.column(name))
            first += len(batch)
            if first > rows[-1]:
                return

    def _every(self) -> Iterator[Any]:
        """Yields all batches from the first on."""
        self._file.seek(0)
        if self._is_file:
            return (self._reader.get_batch(i) for i in range(self._reader.num_record_batches))
        return iter(pa.ipc.open_stream(self._file))


def sound(column: pa.Array) -> pa.Array:
    """Returns a column as it was read. Raises ArrowInvalid for damaged offsets: Arrow would read anywhere in memory."""
    column.validate(full=True)
    return column


@lru_cache(maxsize=4)
def places_of(tree: Any, place: tuple[str, int, int], changed: int) -> list[Batch] | None:  # noqa: ARG001
    """Returns where the batches of an Arrow file are, looked for once per process and version."""
    with opened(tree, place) as table:
        return table.find_places()


@contextmanager
def opened(tree: Tree, place: tuple[str, int, int]) -> Iterator[Any]:
    """Opens a table. Raises UserError if it is none, or damaged where it is read."""
    where, kind = tree.where(place[0]), "Parquet" if suffix_of(place[0]) == ".parquet" else "Arrow"
    try:
        with tree.open(*place) as file:
            yield ParquetTable(file) if kind == "Parquet" else ArrowTable(file)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise UserError(f"{where} is not a readable {kind} file: {first_line(error)}") from error
