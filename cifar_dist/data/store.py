"""Writes a data set, Parquet files and a manifest, completely or not at all."""

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.manifest import FORMAT_VERSION, MANIFEST, OLD_MANIFEST, Manifest, has_old_manifest, read_manifest
from cifar_dist.data.sources.picture import Row
from cifar_dist.data.sources.source import Source
from cifar_dist.data.staged import ROWS_PER_GROUP, rows_sha256, staged_batches
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, seal, to_json
from cifar_dist.storage import Folder, file_sha256
from cifar_dist.uris import join_uri

ROWS_PER_FILE = 10_000
BYTES_PER_FILE = 256 << 20
PREPARING = ".cifar_dist-preparing"
REPLACED = "_manifest.json.replaced"  # in PREPARING: the manifest of the data set that is being replaced
DATA_FILE = re.compile(r"(train|validation|test)-\d{5}\.parquet")
UNFINISHED = re.compile(  # in PREPARING
    rf"({DATA_FILE.pattern}|_manifest\.json(\.replaced)?|start-[0-9a-f]{{8}})(\.[0-9a-f]{{8}}\.tmp)?"
)
Progress = Callable[[Iterable[Row], str, int], Iterable[Row]]  # shows that rows of a split pass, of so many


def prepare(
    source: Source,
    uri: str,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda rows, _split, _total: rows,
) -> tuple[Manifest, bool]:
    """Writes the source as a data set. Returns its manifest and whether anything was written.

    Files are written into a folder PREPARING and moved when complete, the manifest last. An existing data set is left
    alone if it is equal and complete. Another data set, and files of the same names that no manifest names, are
    replaced only with `overwrite`; without it they raise UserError.
    """
    folder = Folder(uri)
    old, has_old_name = old_manifest(folder, overwrite)
    clear_unfinished(folder)
    if not overwrite:
        refuse_foreign(folder, old)
    folder.create(PREPARING)
    mine = f"{PREPARING}/start-{uuid.uuid4().hex[:8]}"
    folder.write(mine, b"")
    seen = folder.exists(MANIFEST), data_files(folder)
    source.forget()
    is_moving = False
    try:
        manifest = write_splits(folder, source, skip_bad, progress)
        same = old is not None and old.sha256 == manifest.sha256
        if same and is_whole(folder, manifest):
            return manifest, False
        if old is not None and not same:
            raise UserError(f"{uri} already holds another data set ({old.source}); use --overwrite or another --out")
        replaced = data_files(folder)
        if not folder.exists(mine) or seen != (folder.exists(MANIFEST), replaced):
            raise UserError(f"another job has written to {uri} meanwhile; run the same command again")
        folder.write(f"{PREPARING}/{MANIFEST}", to_json(asdict(manifest)))  # clear_unfinished reads it
        is_moving = True
        publish(folder, manifest, replaced, has_old_name)
        is_moving = False
        return manifest, True
    except FileNotFoundError as error:
        raise UserError(f"{error} while {uri} was written; is another job preparing the same folder?") from error
    finally:
        source.checker.stop()
        if not is_moving and folder.exists(mine):  # else PREPARING belongs to another job
            folder.delete(PREPARING)


def write_splits(folder: Folder, source: Source, skip_bad: bool, progress: Progress) -> Manifest:
    """Writes all splits into PREPARING; returns the manifest of what was written."""
    splits = {}
    for split in source.splits:
        rows = progress(source.rows(split, skip_bad), split, len(source.splits[split]))
        splits[split] = write_split(folder, split, iter(rows), source.class_names)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source.name,
        class_names=source.class_names,
        splits=splits,
        num_skipped=len(source.skipped),
    )
    return Manifest(**seal(asdict(manifest)))


def old_manifest(folder: Folder, overwrite: bool) -> tuple[Manifest | None, bool]:
    """Returns (manifest of the existing data set, whether its file has the earlier name).

    The manifest is None if there is no data set, and if it is to be overwritten.
    """
    try:
        has_old_name = has_old_manifest(folder)
        has_manifest = folder.exists(MANIFEST) or has_old_name
        return (read_manifest(folder.uri) if has_manifest and not overwrite else None), has_old_name
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from error


def refuse_foreign(folder: Folder, old: Manifest | None) -> None:
    """Raises UserError for files that have names of data files but are not in the manifest `old`."""
    if foreign := [name for name in data_files(folder) if name not in file_names(old)]:
        raise UserError(
            f"{join_uri(folder.uri, foreign[0])} is in the way: no data set of this program names it, so it is left "
            "alone; use another --out, or --overwrite to replace such files"
        )


def publish(folder: Folder, manifest: Manifest, replaced: list[str], has_old_name: bool) -> None:
    """Replaces the old files by the new files in PREPARING, the manifest last."""
    for name in [MANIFEST, *[OLD_MANIFEST] * has_old_name]:
        if folder.exists(name):
            folder.move(name, f"{PREPARING}/{REPLACED}")
    for name in replaced:
        folder.delete(name)
    for name in file_names(manifest):
        folder.move(f"{PREPARING}/{name}", name)
    folder.write(MANIFEST, to_json(asdict(manifest)))


def data_files(folder: Folder) -> list[str]:
    """Returns the entries of the folder whose names are those of data files."""
    return [name for name in folder.names() if DATA_FILE.fullmatch(name)]


def file_names(manifest: Manifest | None) -> list[str]:
    return [file["name"] for split in manifest.splits.values() for file in split["files"]] if manifest else []


def clear_unfinished(folder: Folder) -> None:
    """Removes the leftovers of an interrupted prepare: PREPARING, and files already moved out of it.

    Raises UserError if PREPARING holds files that prepare does not write.
    """
    inside = folder.names(PREPARING)
    if strange := [n for n in inside if not UNFINISHED.fullmatch(n)]:
        raise UserError(
            f"{join_uri(folder.uri, PREPARING, strange[0])} is in the way: this program did not write it; remove it, "
            "or use another --out"
        )
    if MANIFEST in inside and not folder.exists(MANIFEST):  # interrupted while moving files
        known = {sha256 for name in {MANIFEST, REPLACED} & set(inside) for sha256 in checksums(folder, name)}
        for name in data_files(folder):
            if sha256_of(folder, name) in known:
                folder.delete(name)
    folder.delete(PREPARING)


def checksums(folder: Folder, name: str) -> set[str]:
    """Returns the SHA-256 of the files that a manifest in PREPARING names, empty if it is damaged."""
    try:
        splits = from_json(folder.read(f"{PREPARING}/{name}"))["splits"]
        return {file["sha256"] for split in splits.values() for file in split["files"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()


def whole(uri: str, source: str) -> Manifest | None:
    """Returns the manifest of a complete data set prepared from a source of that name, else None."""
    folder = Folder(uri)
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(uri)
    return manifest if manifest.source == source and is_whole(folder, manifest) else None


def is_whole(folder: Folder, manifest: Manifest) -> bool:
    """Whether each file that the manifest names exists and has its checksum."""
    files = [file for split in manifest.splits.values() for file in split["files"]]
    existing = set(folder.names())
    return all(f["name"] in existing and sha256_of(folder, f["name"]) == f["sha256"] for f in files)


def sha256_of(folder: Folder, name: str) -> str:
    """Returns the SHA-256 of a file of the data set (hex), or '' for a broken link."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_local:  # without reading the whole file into memory
            return folder.tried("read", name, lambda: file_sha256(Path(folder.at(name))))
        return hashlib.sha256(folder.read(name)).hexdigest()
    return ""


def write_split(folder: Folder, split: str, rows: Iterator[Row], class_names: list[str]) -> dict[str, Any]:
    """Writes PREPARING/SPLIT-*.parquet in the Hugging Face layout. Returns the split's part of the manifest."""
    features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    files: list[dict[str, Any]] = []
    per_class, encodings = np.zeros(len(class_names), int), set()
    sizes = []
    for chunk in file_chunks(rows):
        images = [{"bytes": row.encoded, "path": row.path} for row in chunk]
        table = pa.table({"image": images, "label": [row.label for row in chunk]}, schema=schema)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, row_group_size=ROWS_PER_GROUP, compression="none", use_dictionary=False)
        content = buffer.getvalue().to_pybytes()
        name = f"{split}-{len(files):05d}.parquet"
        folder.write(f"{PREPARING}/{name}", content)
        digests = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "rows_sha256": rows_sha256(staged_batches(table.to_batches())),
        }
        files.append({"name": name, "num_rows": len(chunk), "num_bytes": len(content), **digests})
        per_class += np.bincount([row.label for row in chunk], minlength=len(class_names))
        encodings |= {row.encoding for row in chunk}
        sizes += [(row.height, row.width) for row in chunk]
    for name, count in zip(class_names, per_class, strict=True):
        if not count:
            raise UserError(f"class {name!r} has no usable images in the {split} split; add some or remove the class")
    heights, widths = zip(*sizes, strict=True)
    return {
        "num_rows": int(per_class.sum()),
        "num_rows_per_class": per_class.tolist(),
        "encodings": sorted(encodings),
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "files": files,
    }


def file_chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yields the rows of one file at a time: ROWS_PER_FILE rows, or fewer if images are large."""
    chunk: list[Row] = []
    num_bytes = 0
    for row in rows:
        chunk.append(row)
        num_bytes += len(row.encoded)
        if len(chunk) == ROWS_PER_FILE or num_bytes >= BYTES_PER_FILE:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk
