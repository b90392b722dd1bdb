"""Webdataset shards: tar archives in which KEY.jpg lies beside KEY.cls or KEY.json."""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cifar_dist.data.sources.archives import TarTree, tar_tree
from cifar_dist.data.sources.columns import LABEL_NAMES
from cifar_dist.data.sources.labels import Labels, numbered
from cifar_dist.data.sources.names import NOTE, STRAY, LeftOut, kind_of, listing, split_in, suffix_of
from cifar_dist.data.sources.source import FileReader, Source, items_table, need_two_classes
from cifar_dist.data.sources.trees import Files, FolderTree, Tree
from cifar_dist.errors import UserError

LABEL_SUFFIXES = (".cls", ".json")
MOST_BYTES = 1 << 20  # of a label's file


@dataclass(frozen=True)
class ShardTree:
    """The files of several tar archives. A file's `at` holds the shard's number above 48 bits of its place."""

    shards: tuple[TarTree, ...]

    @property
    def is_shared(self) -> bool:
        return all(shard.is_shared for shard in self.shards)

    @property
    def reads_ahead(self) -> bool:
        return all(shard.reads_ahead for shard in self.shards)

    def read(self, name: str, size: int, at: int) -> bytes:
        return self.shards[at >> 48].read(name, size, at & ((1 << 48) - 1))

    def where(self, name: str, at: int = 0) -> str:
        return self.shards[at >> 48].where(name)


def is_shard(files: Files) -> bool:
    """Whether a picture and a label of its name are among an archive's files.

    With pictures in several folders, JSON beside them may be notes: the folders are the classes."""
    keys: dict[str, set[str]] = {}
    folders = {name.rpartition("/")[0] for name in files.names if kind_of(name) == ""}
    known = set(LABEL_SUFFIXES) if len(folders) == 1 else {".cls"}
    for name in files.names:
        suffix = suffix_of(name)
        keys.setdefault(name[: len(name) - len(suffix)], set()).add(suffix)
    return any(suffixes & known and any(kind_of(f"x{s}") == "" for s in suffixes) for suffixes in keys.values())


def shards_of(tree: Tree, files: Files) -> list[tuple[str, TarTree]]:
    """Returns the tar archives of a folder by name, empty if it holds other data too."""
    if not isinstance(tree, FolderTree):
        return []
    data = [name for name in files.names if not name.endswith("/") and kind_of(name) not in (STRAY, NOTE)]
    if not data or not all(name.endswith(".tar") for name in data):
        return []
    shards = [(name, tar_tree(tree.where(name))) for name in data]
    return shards if is_shard(shards[0][1].files()) else []


def shard_source(shards: list[tuple[str, TarTree]], where: str, label_column: str | None = None) -> Source:
    """Returns the source of shards. The words in their names say the split. Raises UserError."""
    labels, parts = [], []
    left_out: list[LeftOut] = []
    known = any(split_in(name) for name, _ in shards)
    for number, (name, shard) in enumerate(shards):
        split = split_in(name) or ("" if known else "train")
        if not split:
            raise UserError(f"{where}: {name} names no split and other shards do; rename it, or move it away")
        files = shard.files()
        rows, values = pairs_of(shard, files, label_column, left_out)
        labels.append(Labels(split=split, where=name, values=pa.array(values)))
        at = files.at[rows] + (number << 48)
        parts.append((split, [files.names[row] for row in rows], files.sizes[rows], at, files.changed[rows]))
    found = numbered(labels)
    need_two_classes(where, found.class_names)
    splits: dict[str, list[pa.Table]] = {}
    for (split, names, sizes, at, changed), numbers in zip(parts, found.numbers, strict=True):
        if numbers is not None:
            splits.setdefault(split, []).append(items_table(names, numbers, num_bytes=sizes, at=at, changed=changed))
    return Source(
        name="folder",
        class_names=found.class_names,
        splits={split: pa.concat_tables(tables) for split, tables in splits.items()},
        reader=FileReader(ShardTree(tuple(shard for _, shard in shards))),  # type: ignore[arg-type]
        layout=f"webdataset, {len(shards)} shards: {listing([name for name, _ in shards])}",
        notes=found.notes,
        left_out=left_out,
    )


def pairs_of(
    shard: TarTree, files: Files, label_column: str | None, left_out: list[LeftOut]
) -> tuple[np.ndarray, list[Any]]:
    """Returns (rows of the pictures of a shard, int64 [n], their labels). Raises UserError for one without a label."""
    labels: dict[str, dict[str, int]] = {}
    pictures: dict[str, int] = {}
    for row, name in enumerate(files.names):
        suffix = suffix_of(name)
        key = name[: len(name) - len(suffix)]
        if suffix in LABEL_SUFFIXES and kind_of(key + ".png") == "":
            labels.setdefault(key, {})[suffix] = row
        elif kind_of(name) == "":
            if key in pictures:
                raise UserError(f"{shard.where(name)}: {key} has two pictures; a sample has one")
            pictures[key] = row
        else:
            left_out.append(LeftOut(path=name, kind=kind_of(name) or NOTE, reason="it is no picture"))
    values = []
    for key, row in pictures.items():
        of_key = labels.get(key, {})
        if not of_key:
            raise UserError(f"{shard.where(files.names[row])} has no label: {key}.cls or {key}.json is missing")
        suffix = ".json" if label_column else min(of_key)
        if suffix not in of_key:
            raise UserError(
                f"{shard.where(files.names[row])} has its label in {key}.cls, and --label-column names a key of "
                f"{key}.json; leave it out"
            )
        values.append(label_in(shard, files, of_key[suffix], label_column))
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        values = [str(value) for value in values]
    return np.array(list(pictures.values()), np.int64), values


def label_in(shard: TarTree, files: Files, row: int, label_column: str | None) -> Any:
    """Returns the label in KEY.cls (a number or a text) or KEY.json."""
    name, size = files.names[row], int(files.sizes[row])
    if size > MOST_BYTES:
        raise UserError(f"{shard.where(name)} has {size} bytes; a label has at most {MOST_BYTES}")
    try:
        text = shard.read(name, size, int(files.at[row])).decode().strip()
        if name.endswith(".cls"):
            return int(text) if re.fullmatch("-?[0-9]{1,18}", text) else text
        found = json.loads(text)
        keys = [label_column] if label_column else [key for key in LABEL_NAMES if key in found]
        value = found[keys[0]]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UserError(f"{shard.where(name)} holds no label ({error!r}); name its key with --label-column") from error
    if type(value) not in (int, str):
        raise UserError(f"{shard.where(name)} has the label {value!r}; a number or a text is read")
    return str(value) if isinstance(value, int) and abs(value) >= 1 << 63 else value
