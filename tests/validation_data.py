"""Makes data sets that have a validation split of their own."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cifar_dist.data import sources, store
from cifar_dist.data.manifest import MANIFEST, read_manifest
from cifar_dist.data.sources.source import ItemReader
from cifar_dist.data.staged import rows_sha256, staged_batches
from cifar_dist.sealed_json import seal, to_json

NUM_CLASSES = 10
LABELS = [*range(NUM_CLASSES)] * 2  # of validation images


def draw(i: int, label: int, size: int = 32) -> np.ndarray:
    """Returns the validation image i, uint8 [size, size, 3]."""
    return sources.draw_shape(label, (0, 2, i), size)


def own_validation(
    folder: Path,
    labels: Sequence[int] = LABELS,
    *,
    num_train: int = 40,
    num_test: int = 20,
    sizes: Sequence[int] = (32,),
) -> str:
    """Prepares drawn shapes with a validation image for each of `labels`, by turns of the `sizes` in pixels.

    `labels` need not hold each class. Returns the data set's URI."""
    shapes = sources.shapes(num_train, num_test)
    splits = {split: items_of(shapes, split) for split in ("train", "test")}
    splits["validation"] = [
        sources.Item(f"validation-{i:05d}.png", label, partial(draw, i, label, sizes[i % len(sizes)]))
        for i, label in enumerate(labels or range(NUM_CLASSES))
    ]
    store.prepare(sources.Source.of("shapes", shapes.class_names, splits), str(folder))
    if not labels:
        keep_rows(folder, "validation", np.arange(0))
    return str(folder)


def items_of(source: sources.Source, split: str) -> list[sources.Item]:
    """Returns the items of a source that holds them all."""
    assert isinstance(source.reader, ItemReader)
    return [source.reader.items[at] for at in source.splits[split]["at"].to_pylist()]


def keep_rows(folder: Path, split: str, rows: np.ndarray) -> None:
    """Leaves only these rows in the split, whose classes then may have no images."""
    path = folder / f"{split}-00000.parquet"
    table = pq.read_table(path).take(rows)
    pq.write_table(table, path, compression="none", use_dictionary=False)
    values = asdict(read_manifest(str(folder)))
    digests = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows_sha256": rows_sha256(staged_batches(table.combine_chunks().to_batches())),
    }
    file = {"name": path.name, "num_rows": len(table), "num_bytes": path.stat().st_size, **digests}
    per_class = np.bincount(table["label"].to_numpy(), minlength=NUM_CLASSES).tolist()
    values["splits"][split] |= {
        "num_rows": len(table),
        "num_rows_per_class": per_class,
        "files": [file] * bool(len(rows)),
    }
    (folder / MANIFEST).write_bytes(to_json(seal(values)))
