"""Tells people what was found at a path, before anything is written."""

import io
from collections import Counter

import numpy as np
from PIL import Image

from cifar_dist.data.card_words import size_of
from cifar_dist.data.manifest import SPLITS
from cifar_dist.data.sources.names import listing
from cifar_dist.data.sources.source import Source
from cifar_dist.errors import UserError, printable

NUM_NAMES = 10  # of classes
NUM_SAMPLED = 16  # pictures whose headers are read for their sizes


def found_lines(source: Source, path: str | None) -> list[str]:
    """Returns the lines: layout, pictures and classes by split, sizes, what is left out, notes."""
    lines = [f"found in {path}: {source.layout}" if path and source.layout else f"source {source.name}"]
    for split in SPLITS:
        if split in source.splits:
            lines.append(f"  {split:11}{described(source, split)}")
    lines.append(f"  {'classes':11}{listing(source.class_names, NUM_NAMES)}")
    if "validation" not in source.splits:
        lines.append("  validation drawn from train by each run")
    if sizes := sampled_sizes(source):
        (low, high), num = (min(sizes), max(sizes)), len(sizes)
        shown = shape(low) if low == high else f"from {shape(low)} to {shape(high)}"
        lines.append(f"  {'sizes':11}{shown} pixels (width x height, of {num} pictures looked at)")
    kinds = Counter(out.kind for out in source.left_out)
    for kind, count in kinds.items():
        names = [out.path for out in source.left_out if out.kind == kind]
        lines.append(f"  {'left out':11}{count:,} {kind}: {listing(names)}")
    lines += [f"  {'note':11}{note}" for note in source.notes]
    return [printable(line) for line in lines]


def described(source: Source, split: str) -> str:
    items = source.splits[split]
    counts = np.bincount(items["label"].to_numpy(), minlength=len(source.class_names))
    few, most = int(counts.min()), int(counts.max())
    each = f"{few:,} each" if few == most else f"{few:,} to {most:,} each"
    num_bytes = int(np.maximum(items["num_bytes"].to_numpy(), 0).sum())
    size = f", {size_of(num_bytes)}" if num_bytes else ""
    missing = [name for name, count in zip(source.class_names, counts, strict=True) if not count]
    none = f"; none of {listing(missing)}" if missing else ""
    drawn = ", drawn from train" if split in source.drawn else ""
    num_classes = len(counts) - len(missing)
    return f"{len(items):,} pictures of {num_classes:,} classes, {each}{size}{none}{drawn}"


def shape(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def sampled_sizes(source: Source) -> list[tuple[int, int]]:
    """Returns (width, height) of pictures spread over train, those that can be read."""
    items = source.splits["train"]
    rows = np.unique(np.linspace(0, len(items) - 1, NUM_SAMPLED).astype(int))
    found = []
    for read in source.reader.reads(items.take(rows)):
        try:
            data = read().data
            if isinstance(data, np.ndarray):
                found.append((data.shape[1], data.shape[0]))
                continue
            with Image.open(io.BytesIO(data)) as image:
                found.append(image.size)
        except (UserError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # the preparation itself says what is wrong
    return found
