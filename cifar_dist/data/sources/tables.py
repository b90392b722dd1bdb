"""Pictures in tables: Parquet files and Arrow files, named as the library `datasets` names them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.sources.columns import Columns, columns_of
from cifar_dist.data.sources.labels import Labels, numbered
from cifar_dist.data.sources.names import LeftOut, kind_of, listing, split_in, suffix_of
from cifar_dist.data.sources.source import Content, Read, Source, items_table, need_two_classes
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.errors import UserError, first_line

TABLES = {".parquet", ".arrow"}
ROWS_AT_ONCE = 32
BESIDE = "it is no table of this data set"
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
        numbers, rows = (items[name].to_numpy() for name in ("file", "at"))
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        start = 0
        for end in filter(None, ends):
            yield from self._of_file(int(numbers[start]), rows[start:end])
            start = end

    def _of_file(self, number: int, rows: np.ndarray) -> Iterator[Read]:
        place, column = self.files[number], self.columns[number]
        where = self.tree.where(place[0])
        num_found = 0
        with opened(self.tree, place) as table:
            for first, batch in table.batches(column, rows):
                chosen = rows[(rows >= first) & (rows < first + len(batch))]
                num_found += len(chosen)
                for row in chosen.tolist():
                    yield partial(content_of, batch, row - first, f"{where} row {row}", row)
        if num_found < len(rows):
            raise UserError(f"{where} holds fewer rows than it says; copy it again")


def content_of(column: Any, at: int, where: str, row: int) -> Content:
    """Returns a row's picture. Does not follow paths to files outside the table."""
    value = column[at].as_py()
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
    """An Arrow file as `save_to_disk` writes it: a stream, or a file of the other format."""

    def __init__(self, file: Any) -> None:
        file = file if isinstance(file, pa.NativeFile) else pa.PythonFile(file, "r")
        magic = file.read(6)
        file.seek(0)
        reader = pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
        self.schema = reader.schema
        self._file, self._is_file = file, magic == b"ARROW1"
        every = (reader.get_batch(i) for i in range(reader.num_record_batches)) if self._is_file else iter(reader)
        self._batches = every

    def labels_and_sizes(self, label: str, image: str) -> tuple[Any, np.ndarray]:
        """Returns the labels, and the mean bytes of a picture of each row's batch, int64 [n]. Reads to the end."""
        labels, sizes = [], []
        for batch in self._batches:
            labels.append(batch.column(label))
            sizes.append(np.full(len(batch), batch.column(image).nbytes // max(len(batch), 1), np.int64))
        if not self._is_file:
            self._file.seek(self._file.size() - len(END_OF_STREAM))
            if self._file.read() != END_OF_STREAM:  # Arrow takes the end of the file for that of the stream
                raise OSError("its end is missing")
        kind = self.schema.field(label).type
        return pa.chunked_array(labels, kind), np.concatenate([np.zeros(0, np.int64), *sizes])

    def batches(self, name: str, rows: np.ndarray) -> Iterator[tuple[int, Any]]:
        first = 0
        for batch in self._batches:
            yield first, batch.column(name)
            first += len(batch)
            if first > rows[-1]:
                return


@contextmanager
def opened(tree: Tree, place: tuple[str, int, int]) -> Iterator[Any]:
    """Opens a table. Raises UserError if it is none, or damaged where it is read."""
    where, kind = tree.where(place[0]), "Parquet" if suffix_of(place[0]) == ".parquet" else "Arrow"
    try:
        with tree.open(*place) as file:
            yield ParquetTable(file) if kind == "Parquet" else ArrowTable(file)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise UserError(f"{where} is not a readable {kind} file: {first_line(error)}") from error


def is_table(name: str) -> bool:
    base = name.rpartition("/")[2]
    return suffix_of(name) in TABLES and kind_of(name) != "" and not base.startswith(("_", "cache-", "."))


def table_source(
    tree: Tree, files: Files, where: str, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Returns the source of the tables below a folder. Raises UserError for a layout that is not understood."""
    chosen = by_split(files, where)
    rows = [(split, row) for split in ("train", "validation", "test") for row in chosen.get(split, [])]
    places = tuple((files.names[row], int(files.sizes[row]), int(files.at[row])) for _, row in rows)
    labels, sizes, columns = [], [], []
    for (split, _), place in zip(rows, places, strict=True):
        of_file, table_labels, table_sizes = read_labels(tree, place, split, image_column, label_column)
        columns.append(of_file)
        labels.append(table_labels)
        sizes.append(table_sizes)
    found = numbered(where, labels)
    need_two_classes(where, found.class_names)
    splits: dict[str, list[pa.Table]] = {}
    for i, ((split, row), numbers) in enumerate(zip(rows, found.numbers, strict=True)):
        if numbers is not None:
            changed = int(files.changed[row]) * 31 + int(files.sizes[row])
            number: dict[str, Any] = {"num_bytes": sizes[i], "file": i, "at": np.arange(len(numbers))}
            part = items_table([""] * len(numbers), numbers, **number, changed=changed % (1 << 62))
            splits.setdefault(split, []).append(part)
    used = {row for _, row in rows}
    others = [n for i, n in enumerate(files.names) if i not in used and not n.endswith("/")]
    return Source(
        name="parquet",
        class_names=found.class_names,
        splits={split: pa.concat_tables(parts) for split, parts in splits.items()},
        reader=TableReader(tree, places, tuple(of_file.image for of_file in columns)),
        layout=describe(columns[0], len(places)),
        notes=found.notes,
        left_out=[LeftOut(path=n, kind=kind_of(n) or "pictures beside the tables", reason=BESIDE) for n in others],
    )


def describe(columns: Columns, num_files: int) -> str:
    more = f" (other columns that could be: {', '.join(columns.others)}; --label-column)" if columns.others else ""
    return f"{num_files} table files, pictures in column {columns.image}, labels in column {columns.label}{more}"


def read_labels(
    tree: Tree, place: tuple[str, int, int], split: str, image_column: str | None, label_column: str | None
) -> tuple[Columns, Labels, np.ndarray]:
    """Returns a table's columns, its labels, and the mean bytes of its pictures (int64 [n])."""
    where = tree.where(place[0])
    with opened(tree, place) as table:
        columns = columns_of(where, table.schema, image_column, label_column)
        if isinstance(table, ParquetTable):
            values, sizes = table.column(columns.label), table.sizes(columns.image)
        else:
            values, sizes = table.labels_and_sizes(columns.label, columns.image)
    return columns, Labels(split=split, where=where, values=values, names=columns.names), sizes


def by_split(files: Files, where: str) -> dict[str, list[int]]:
    """Returns the rows of the tables of each split by the words in their names; without such words all are train."""
    tables = [i for i, name in enumerate(files.names) if is_table(name)]
    if not tables:
        raise UserError(f"{where} holds no Parquet or Arrow files; --source folder reads folders of pictures")
    splits = {i: split_in(files.names[i]) for i in tables}
    if not any(splits.values()):
        splits = dict.fromkeys(tables, "train")
    if unread := [files.names[i] for i, split in splits.items() if split is None]:
        raise UserError(
            f"{where}/{unread[0]} would not be read: its name says no split, and others say train, validation or test; "
            "rename it, or move it away"
        )
    configs = sorted({config_of(files.names[i]) for i in tables if splits[i] == "train"})
    if not configs:
        raise UserError(f"{where} holds no table of train, only {listing([files.names[i] for i in tables])}")
    if len(configs) > 1:
        raise UserError(
            f"{where} holds several data sets: {listing(configs, 10)}; name the folder of one of them with --path"
        )
    found: dict[str, list[int]] = {}
    for i, split in splits.items():
        if split and config_of(files.names[i]) == configs[0]:
            found.setdefault(split, []).append(i)
    return found


def config_of(name: str) -> str:
    """Returns the folders of a table without those that name a split, or only hold the data."""
    return "/".join(part for part in name.split("/")[:-1] if part != "data" and not split_in(part))
