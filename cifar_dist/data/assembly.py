"""Puts parts together: the manifest and the data card of a data set, and the names of its files."""

import hashlib
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.card import data_card
from cifar_dist.data.left_out import BadPictures
from cifar_dist.data.making import DeepPictures
from cifar_dist.data.manifest import FORMAT_VERSION, Manifest
from cifar_dist.data.parts import Made, Part
from cifar_dist.data.sources.source import Source
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import seal
from cifar_dist.storage import Folder


def of_split(split: str, parts: list[Part], made: list[Made]) -> list[Made]:
    return [m for part, m in zip(parts, made, strict=True) if part.split == split]


def moves(parts: list[Part], made: list[Made]) -> list[tuple[str, str]]:
    """Returns (name in the folder of parts, final name) of each file."""
    found, numbers = [], dict.fromkeys((part.split for part in parts), 0)
    for part, m in zip(parts, made, strict=True):
        if m.file:
            found.append((f"{part.name}.parquet", file_name(part.split, numbers[part.split])))
            numbers[part.split] += 1
    return found


def file_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def manifest_of(source: Source, parts: list[Part], made: list[Made]) -> Manifest:
    """Returns the manifest of the parts. Raises UserError for an empty split, or a class that is empty in train."""
    splits = {split: split_of(split, of_split(split, parts, made)) for split in source.splits}
    for name, count in zip(source.class_names, splits["train"]["num_rows_per_class"], strict=True):
        if not count:
            raise UserError(f"class {name!r} has no usable images in the train split; add some or remove the class")
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.name,
        class_names=source.class_names,
        splits=splits,
        num_skipped=sum(len(m.bad) for m in made),
    )
    return Manifest(**seal(asdict(manifest)))


def split_of(split: str, made: list[Made]) -> dict[str, Any]:
    """Returns a split's part of the manifest."""
    files = [m.file for m in made if m.file]
    if not files:
        raise UserError(f"the {split} split has no usable images; add some, or leave the split out")
    per_class = np.sum([m.num_rows_per_class for m in made], axis=0)
    heights, widths = [side for m in made for side in m.heights], [side for m in made for side in m.widths]
    return {
        "num_rows": int(per_class.sum()),
        "num_rows_per_class": per_class.tolist(),
        "encodings": sorted({encoding for m in made for encoding in m.encodings}),
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "files": [{"name": file_name(split, i), **file} for i, file in enumerate(files)],
    }


def made_of(parts: list[Part]) -> str:
    """Returns a SHA-256 (hex) of all that the data set follows from."""
    return hashlib.sha256("".join(part.key for part in parts).encode()).hexdigest()


def card_of(
    source: Source, manifest: Manifest, folder: Folder, parts: list[Part], made: list[Made], bad: BadPictures
) -> dict[str, Any]:
    """Returns the data card."""
    facts: dict[str, list[pa.Table]] = {}
    deep = DeepPictures()
    for part, m in zip(parts, made, strict=True):
        if m.file:
            content = folder.read(f"{part.name}.facts")
            facts.setdefault(part.split, []).append(pq.read_table(pa.BufferReader(content)))
        if m.deep["num_pictures"]:
            deep.add(m.deep["where"], m.deep["largest"], m.deep["num_pictures"])
    warning = deep.warning()
    return data_card(
        source=source.name,
        manifest_sha256=manifest.sha256,
        class_names=source.class_names,
        splits={split: pa.concat_tables(tables) for split, tables in facts.items()},
        left_out=bad.dicts(),
        layout=source.layout,
        drawn=source.drawn,
        made_of=made_of(parts),
        notes=[warning] if warning else [],
    )
