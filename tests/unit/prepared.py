"""What preparing makes of a source, for tests: its checked rows, and data sets that hold what no check has seen."""

import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cifar_dist.data import sources, staged
from cifar_dist.data.check import Checker
from cifar_dist.data.making import Found, Row, checked_rows
from cifar_dist.data.parts import parts_of
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import seal, to_json

CHECKER = Checker()  # one child process for all tests of a file


def read(
    source: sources.Source,
    split: str = "train",
    *,
    skip_bad: bool = False,
    rules: sources.Rules | None = None,
    checker: Checker = CHECKER,
) -> tuple[list[Row], Found]:
    """The checked rows of a split, and what was found out about them."""
    found, rows = Found(), []
    for part in parts_of(source, rules or sources.Rules(), near_duplicates=False, skip_bad=skip_bad):
        if part.split == split:
            rows += checked_rows(part, checker, found, lambda _: None)
    return rows, found


def sentence_of(action: Callable[[], object]) -> str | None:
    """What the action refuses with; None if it does what it should."""
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def rows(source: sources.Source, split: str = "train", skip_bad: bool = False) -> list[Row]:
    return read(source, split, skip_bad=skip_bad)[0]


@functools.cache
def png(number: int) -> bytes:
    """A picture that no other number has, 8 x 8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def numbered(*names: str) -> dict[str, bytes]:
    """A file for each name, the picture of its position."""
    return {name: png(i) for i, name in enumerate(names)}


def listed(source: sources.Source) -> dict[str, list[tuple[str, str]]]:
    """(path, class name) of each file of each split, in stored order. Reads no picture."""
    return {
        split: [(r["name"], source.class_names[r["label"]]) for r in items.to_pylist()]
        for split, items in source.splits.items()
    }


def contents(source: sources.Source) -> dict[str, tuple[bytes, str]]:
    """(stored bytes, class name) of each picture by its path, of all splits."""
    return {
        row.path: (row.encoded, source.class_names[row.label]) for split in source.splits for row in rows(source, split)
    }


def put_unchecked(folder: str | Path, content: bytes, row: int, split: str = "train") -> None:
    """Replaces a stored picture, with right checksums, as a program without checks would store it."""
    file, manifest = Path(folder, f"{split}-00000.parquet"), Path(folder, "_manifest.json")
    table = pq.read_table(file)
    images = table["image"].to_pylist()
    images[row]["bytes"] = content
    table = table.set_column(0, table.schema.field("image"), pa.array(images, table.schema.field("image").type))
    pq.write_table(table, file)
    values = json.loads(manifest.read_bytes())
    values["splits"][split]["files"][0] |= {
        "num_bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "rows_sha256": staged.rows_sha256(staged.staged_batches(table.to_batches())),
    }
    manifest.write_bytes(to_json(seal(values)))
