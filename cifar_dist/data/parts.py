"""Divides a data set into parts, and finds those that were made before.

A part's bytes follow from its items and rules alone. So parts may be made in any process and order, and a part that was
made before a kill need not be made again."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from cifar_dist.data.sources.picture import Rules
from cifar_dist.data.sources.source import ItemReader, Reader, Source, digest_of
from cifar_dist.sealed_json import from_json, is_sealed
from cifar_dist.storage import Folder
from cifar_dist.versions import package_versions

PREPARING = ".cifar_dist-preparing"
ROWS_PER_FILE = 10_000
BYTES_PER_FILE = 16 << 20, 256 << 20  # least and most, of the source's files
NUM_FILES = 24  # of a split, if BYTES_PER_FILE allows


@dataclass(frozen=True, kw_only=True)
class Part:
    """Pictures that become one file. `key`: a SHA-256 (hex) of all that its bytes follow from."""

    key: str
    split: str
    items: pa.Table
    reader: Reader
    class_names: list[str]
    rules: Rules
    near_duplicates: bool
    skip_bad: bool

    @property
    def num_bytes(self) -> int:
        """Of the source's files, as far as it is known."""
        return int(np.maximum(self.items["num_bytes"].to_numpy(), 0).sum())

    @property
    def name(self) -> str:
        return f"{PREPARING}/part-{self.key}"

    def portable(self) -> "Part":
        """Returns the part for another process, without the items of other parts: Arrow would send them too."""
        items = self.items.take(np.arange(len(self.items)))
        if isinstance(self.reader, ItemReader):
            reader, items = self.reader.only(items)
            return replace(self, reader=reader, items=items)
        return replace(self, items=items)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A part that was made: its file's part of the manifest, and what was found. `bad`: path, reason, label of each."""

    key: str
    file: dict[str, Any] | None  # None if no picture was sound
    facts_sha256: str
    num_rows_per_class: list[int]
    encodings: list[str]
    heights: list[int]
    widths: list[int]
    bad: list[dict[str, Any]] = field(default_factory=list)
    deep: dict[str, Any] = field(default_factory=dict)


def parts_of(source: Source, rules: Rules, *, near_duplicates: bool, skip_bad: bool) -> Iterator[Part]:
    """Yields the parts of a source, split by split. They depend on the items alone, not on who makes them."""
    fixed = f"{rules} {near_duplicates} {json.dumps(source.class_names)} {source.reader.identity} {versions()}"
    for split, items in source.splits.items():
        bounds = bounds_of(items["num_bytes"].to_numpy())
        for start, stop in itertools.pairwise(bounds):
            chosen = items.slice(start, stop - start)
            yield Part(
                key=hashlib.sha256(f"{fixed} {split} {digest_of(chosen)}".encode()).hexdigest(),
                split=split,
                items=chosen,
                reader=source.reader,
                class_names=source.class_names,
                rules=rules,
                near_duplicates=near_duplicates,
                skip_bad=skip_bad,
            )


def versions() -> str:
    """Returns the versions of what decides on a part's bytes."""
    dali = [text for name, text in package_versions().items() if "dali" in name]
    return f"1 Pillow {version('pillow')} DALI {dali} pyarrow {pa.__version__}"


def bounds_of(num_bytes: np.ndarray) -> list[int]:
    """Returns where the files of a split begin, and the number of rows.

    A file holds at most ROWS_PER_FILE rows. It holds a NUM_FILES-th of the split's bytes, within BYTES_PER_FILE: many
    processes can make a small data set too."""
    sizes = np.maximum(num_bytes, 0)
    least, most = BYTES_PER_FILE
    per_file = min(max(int(sizes.sum()) // NUM_FILES, least), most)
    bounds = [0]
    for start in range(0, len(sizes), ROWS_PER_FILE):
        ends = np.cumsum(sizes[start : start + ROWS_PER_FILE])
        num_files = max(1, -(-int(ends[-1]) // per_file))
        cuts = np.searchsorted(ends, ends[-1] / num_files * np.arange(1, num_files)) + 1
        bounds += [start + int(cut) for cut in np.unique(cuts) if 0 < cut < len(ends)] + [start + len(ends)]
    return bounds


def made_before(folder: Folder, part: Part) -> Made | None:
    """Returns what is known of a part that was made earlier and is whole, else None."""
    made = noted(folder, part)
    if made is None or (made.file and sha256_of(folder, f"{part.name}.parquet") != made.file["sha256"]):
        return None
    return made if sha256_of(folder, f"{part.name}.facts") == made.facts_sha256 else None


def noted(folder: Folder, part: Part) -> Made | None:
    """Returns what was noted of a part when it was made, None if nothing was. Its files may be gone."""
    try:
        values = from_json(folder.read(f"{part.name}.json"))
        made = Made(**{k: v for k, v in values.items() if k != "sha256"})
        return made if is_sealed(values) and made.key == part.key and (part.skip_bad or not made.bad) else None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def sha256_of(folder: Folder, name: str) -> str:
    """Returns the SHA-256 of a file in a folder (hex), '' if it is gone. Reads it in small parts."""
    try:
        with folder.open(name) as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except FileNotFoundError:
        return ""
