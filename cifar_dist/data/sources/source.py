"""A data set to be stored: class names, items per split, and the reader of the items."""

import hashlib
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from cifar_dist.data.order import TEST, stratified_split
from cifar_dist.data.sources.names import LeftOut
from cifar_dist.data.sources.trees import Tree
from cifar_dist.errors import UserError

# One row per picture, in stored order. num_bytes: of the file, to divide work evenly. file, at: where the reader finds
# it. changed: with the name and the size, tells that it is the same picture as before.
ITEMS = pa.schema(
    [
        ("name", pa.string()),
        ("label", pa.int64()),
        ("num_bytes", pa.int64()),
        ("file", pa.int32()),
        ("at", pa.int64()),
        ("changed", pa.int64()),
    ]
)
THREADS = 8  # that read ahead from remote storage


class Content(NamedTuple):
    """A picture as read: the file's bytes or RGB pixels (uint8 [H, W, 3]); the path to store; its name in messages."""

    data: bytes | np.ndarray
    path: str
    where: str


Read = Callable[[], Content]  # raises UserError for a picture that cannot be read


class Reader(Protocol):
    """Reads items of a source, in any process."""

    @property
    def is_shared(self) -> bool:
        """Whether other machines can read them."""

    @property
    def identity(self) -> str:
        """Differs for readers that may read other content for equal items."""

    def reads(self, items: pa.Table) -> Iterator[Read]:
        """Yields a call for each item, in order. Calls are made once each, in order."""


@dataclass(frozen=True)
class FileReader:
    """Reads items that are files of a tree."""

    tree: Tree

    @property
    def is_shared(self) -> bool:
        return self.tree.is_shared

    @property
    def identity(self) -> str:
        return repr(self.tree)

    def reads(self, items: pa.Table) -> Iterator[Read]:
        places = zip(*(items[name].to_pylist() for name in ("name", "num_bytes", "at")), strict=True)
        if not self.tree.reads_ahead:
            return (self._read_of(*place) for place in places)
        return ahead(self._read_of(*place) for place in places)

    def _read_of(self, name: str, size: int, at: int) -> Read:
        def read() -> Content:
            where = self.tree.where(name, at)
            if size < 0:
                raise UserError(f"{where} cannot be read: it is a broken link, or no regular file")
            return Content(self.tree.read(name, size, at), name, where)

        return read


def ahead(reads: Iterable[Read]) -> Iterator[Read]:
    """Yields the calls while threads make the next ones: remote storage answers slowly, but many at once."""
    calls = iter(reads)
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque(pool.submit(read) for read in itertools.islice(calls, THREADS))
        while waiting:
            first = waiting.popleft()
            waiting.extend(pool.submit(read) for read in itertools.islice(calls, 1))
            yield first.result


@dataclass(frozen=True)
class Item:
    """A picture of a source that is not a file. `read` returns a file's bytes, or RGB pixels (uint8 [H, W, 3]).

    `path` is stored with the picture. `where` names it in messages.
    """

    path: str
    label: int
    read: Callable[[], bytes | np.ndarray]
    where: str = ""


@dataclass(frozen=True)
class ItemReader:
    """Reads Items, by their position."""

    items: list[Item]
    identity: str
    is_shared: bool = False

    def reads(self, items: pa.Table) -> Iterator[Read]:
        def read_of(item: Item) -> Read:
            return lambda: Content(item.read(), item.path, item.where or item.path)

        return (read_of(self.items[at]) for at in items["at"].to_pylist())

    def only(self, items: pa.Table) -> tuple["ItemReader", pa.Table]:
        """Returns a reader of these items alone, and the items with their new positions."""
        chosen = [self.items[at] for at in items["at"].to_pylist()]
        column = ITEMS.get_field_index("at")
        return replace(self, items=chosen), items.set_column(column, "at", pa.array(range(len(chosen)), pa.int64()))


@dataclass(kw_only=True)
class Source:
    """A data set to be stored: class names in label order and, per split, a table of ITEMS.

    layout, notes: what was found, to be told. left_out: files that are no pictures of the data set.
    drawn: splits that were drawn from train.
    """

    name: str
    class_names: list[str]
    splits: dict[str, pa.Table]
    reader: Reader
    layout: str = ""
    notes: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)

    @staticmethod
    def of(name: str, class_names: list[str], splits: dict[str, list[Item]], identity: str = "") -> "Source":
        """Returns a source of Items. Without an `identity`, nothing of it is used again after a kill."""
        every = [item for items in splits.values() for item in items]
        tables, start = {}, 0
        for split, items in splits.items():
            numbers = range(start, start := start + len(items))
            tables[split] = items_table([i.path for i in items], [i.label for i in items], at=list(numbers))
        reader = ItemReader(every, identity or uuid.uuid4().hex)
        return Source(name=name, class_names=class_names, splits=tables, reader=reader)


def items_table(
    names: Any, labels: Any, *, num_bytes: Any = 0, file: Any = 0, at: Any = 0, changed: Any = 0
) -> pa.Table:
    """Returns a table of ITEMS. A single number stands for all rows."""
    columns = {"name": names, "label": labels, "num_bytes": num_bytes, "file": file, "at": at, "changed": changed}
    full = [np.full(len(labels), c, np.int64) if isinstance(c, int) else c for c in columns.values()]
    return pa.table([pa.array(c, f.type) for c, f in zip(full, ITEMS, strict=True)], schema=ITEMS)


def digest_of(items: pa.Table) -> str:
    """Returns a SHA-256 (hex) of a table of ITEMS, the same for equal values."""
    digest = hashlib.sha256()
    for name in ITEMS.names:
        column = items[name].combine_chunks()
        if pa.types.is_string(column.type):
            for text in column.to_pylist():
                digest.update(f"{text}\n".encode())
        else:
            digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).data)
    return digest.hexdigest()


def with_test_split(source: Source, fraction: float, seed: int) -> Source:
    """Draws a missing test split from train, by a seeded permutation in each class. Raises UserError."""
    if "test" in source.splits:
        return source
    items = source.splits["train"]
    labels = items["label"].to_numpy()
    counts = np.bincount(labels, minlength=len(source.class_names))
    if (counts < 2).all():
        raise UserError("no class has 2 images or more, so no test split can be drawn from train")
    train, test = stratified_split(labels, fraction, (TEST, seed))
    if alone := [name for name, count in zip(source.class_names, counts, strict=True) if count == 1]:
        source.notes.append(
            f"{len(alone)} of {len(counts)} classes have 1 image, so none for test, such as {alone[0]!r}"
        )
    others = {name: table for name, table in source.splits.items() if name != "train"}
    source.splits = {"train": items.take(train), **others, "test": items.take(test)}
    source.drawn.append("test")
    return source


def need_two_classes(where: str, class_names: list[str]) -> None:
    if len(class_names) < 2:
        named = f", {class_names[0]!r}" if class_names else ""
        raise UserError(f"{where} holds {len(class_names)} classes{named}; a classifier needs 2 or more")
