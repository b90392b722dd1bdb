"""Pictures in tables: Parquet files and Arrow files, named as the library `datasets` names them."""

from typing import Any

import numpy as np
import pyarrow as pa

from cifar_dist.data.manifest import SPLITS
from cifar_dist.data.sources.columns import Columns, columns_of
from cifar_dist.data.sources.labels import Labels, numbered
from cifar_dist.data.sources.names import LeftOut, kind_of, listing, split_in, suffix_of
from cifar_dist.data.sources.source import Source, items_table, need_two_classes
from cifar_dist.data.sources.table_readers import ParquetTable, TableReader, opened
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.errors import UserError

TABLES = {".parquet", ".arrow"}
UNREAD_TABLE = "tables that are not read"
BESIDE = "it is no table of this data set"


def is_table(name: str) -> bool:
    base = name.rpartition("/")[2]
    return suffix_of(name) in TABLES and kind_of(name) != "" and not base.startswith(("_", "cache-", "."))


def table_source(
    tree: Tree, files: Files, where: str, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """Returns the source of the tables below a folder. Raises UserError for a layout that is not understood."""
    chosen, unread = by_split(files, where)
    rows = [(split, row) for split in SPLITS for row in chosen.get(split, [])]
    places = tuple((files.names[row], int(files.sizes[row]), int(files.at[row])) for _, row in rows)
    labels, sizes, columns = [], [], []
    for (split, _), place in zip(rows, places, strict=True):
        of_file, table_labels, table_sizes = read_labels(tree, place, split, image_column, label_column)
        columns.append(of_file)
        labels.append(table_labels)
        sizes.append(table_sizes)
    found = numbered(labels)
    need_two_classes(where, found.class_names)
    splits: dict[str, list[pa.Table]] = {}
    for i, ((split, row), numbers) in enumerate(zip(rows, found.numbers, strict=True)):
        if numbers is not None:
            changed = int(files.changed[row]) * 31 + int(files.sizes[row])
            number: dict[str, Any] = {"num_bytes": sizes[i], "file": i, "at": np.arange(len(numbers))}
            part = items_table([""] * len(numbers), numbers, **number, changed=changed % (1 << 62))
            splits.setdefault(split, []).append(part)
    used = {row for _, row in rows}
    others = [n for i, n in enumerate(files.names) if i not in used and n not in unread and not n.endswith("/")]
    left_out = [LeftOut(path=n, kind=UNREAD_TABLE, reason=reason) for n, reason in unread.items()]
    left_out += [LeftOut(path=n, kind=kind_of(n) or "pictures beside the tables", reason=BESIDE) for n in others]
    return Source(
        name="parquet",
        class_names=found.class_names,
        splits={split: pa.concat_tables(parts) for split, parts in splits.items()},
        reader=TableReader(tree, places, tuple(of_file.image for of_file in columns)),
        layout=describe(columns[0], len(places)),
        notes=[*found.notes, *(f"{name} is left out: {reason}" for name, reason in unread.items())],
        left_out=left_out,
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
        columns = columns_of(where, table.schema, image_column, label_column, needs_label=split == "train")
        if isinstance(table, ParquetTable) and not columns.label:
            sizes = table.sizes(columns.image)
            values = pa.nulls(len(sizes))
        elif isinstance(table, ParquetTable):
            values, sizes = table.column(columns.label), table.sizes(columns.image)
        else:
            values, sizes = table.labels_and_sizes(columns.label or columns.image, columns.image)
            values = values if columns.label else pa.nulls(len(sizes))
    return columns, Labels(split=split, where=where, values=values, names=columns.names), sizes


def by_split(files: Files, where: str) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Returns the rows of the tables of each split by the words in their names; without such words all are train.

    Returns the tables that are left out by name, too, with the reason."""
    tables = [i for i, name in enumerate(files.names) if is_table(name)]
    if not tables:
        raise UserError(f"{where} holds no Parquet or Arrow files; --source folder reads folders of pictures")
    splits = {i: split_in(files.names[i]) for i in tables}
    if not any(splits.values()):
        splits = dict.fromkeys(tables, "train")
    trains = {config_of(files.names[i]): files.names[i] for i in tables if splits[i] == "train"}
    if not trains:
        raise UserError(f"{where} holds no table of train, only {listing([files.names[i] for i in tables])}")
    if len(trains) > 1:
        raise UserError(
            f"{where} holds several data sets: {listing(sorted(trains), 10)}; name the folder of one of them "
            "with --path"
        )
    ((config, train),) = trains.items()
    found: dict[str, list[int]] = {}
    unread: dict[str, str] = {}
    for i, split in splits.items():
        if split and config_of(files.names[i]) == config:
            found.setdefault(split, []).append(i)
        else:
            unread[files.names[i]] = "it is of another data set" if split else "its name says no split"
    for name in unread:
        if (split := split_in(name)) and split not in found:
            raise UserError(
                f"{where}/{name} belongs to another data set than {where}/{train}, which has no {split}; put both into "
                "one folder, or name the folder of one data set with --path"
            )
    return found, unread


def config_of(name: str) -> str:
    """Returns the folders of a table without those that name a split, or only hold the data."""
    return "/".join(part for part in name.split("/")[:-1] if part != "data" and not split_in(part))
