"""A data set staged on a node: memory-mapped Arrow files, copied once per node and checked."""

import bisect
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.private import default_folder, keep_own, one_at_a_time, private_folder, user_folder
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

ROWS_PER_GROUP = 1_000  # also the rows of one Arrow batch: staging holds one in memory
STAGED = pa.schema([("bytes", pa.large_binary()), ("path", pa.string()), ("label", pa.int64())])


def use_decoded(shape: tuple[int, int] | None, num_images: int, cache: str, budget_mib: int) -> bool:
    """Whether to keep decoded pixels: uint8, num_images x height x width x 3 bytes, against the budget in MiB."""
    if cache == "decoded" and shape is None:
        raise UserError("--cache decoded needs images of one size, these differ; use --cache auto or encoded")
    fits = shape is not None and num_images * shape[0] * shape[1] * 3 <= budget_mib << 20
    return cache == "decoded" or (cache == "auto" and fits)


class StagedSplit:
    """One split as memory-mapped Arrow: `encoded(i)` is a zero-copy view of image i's bytes (uint8 [num_bytes])."""

    def __init__(self, path: Path) -> None:
        self.file = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [self.file.get_batch(i) for i in range(self.file.num_record_batches)]
        # Not to_numpy(), which copies each batch and leaves the pieces in the heap.
        self.labels = np.concatenate([np.frombuffer(b["label"].buffers()[1], np.int64, len(b)) for b in batches])
        self._paths = [b["path"] for b in batches]
        self._starts = np.cumsum([0] + [len(b) for b in batches]).tolist()
        self._chunks = []
        for column in (b["bytes"] for b in batches):
            _, offsets, data = column.buffers()
            self._chunks.append((np.frombuffer(offsets, np.int64, len(column) + 1), np.frombuffer(data, np.uint8)))

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, i: int) -> np.ndarray:
        chunk, at = self._place(i)
        offsets, data = self._chunks[chunk]
        return data[offsets[at] : offsets[at + 1]]

    def _place(self, i: int) -> tuple[int, int]:
        chunk = bisect.bisect_right(self._starts, i) - 1
        return chunk, i - self._starts[chunk]

    def path(self, i: int) -> str:
        """The image's path in its source, to name it in messages."""
        chunk, at = self._place(i)
        return self._paths[chunk][at].as_py()


def default_staging_folder() -> Path:
    """Where this user's staged data lies unless --staging-folder says otherwise."""
    return user_folder(Path(default_folder()))


def staging_root(staging_folder: Path | str | None = None) -> Path:
    """This user's own folder of staged data, in `staging_folder` or in the temporary folder."""
    return user_folder(Path(staging_folder)) if staging_folder else default_staging_folder()


def staging_area(manifest: Manifest, staging_folder: Path | str | None = None) -> Path:
    """This user's local folder of this data set, named by its checksum: another data set never shares it."""
    return private_folder(staging_root(staging_folder) / manifest.sha256[:16])


@dataclass(frozen=True)
class Staging:
    """How a job stages. Processes with the same `job` check a file once; `job` '' checks it each time.

    `say` is told of waits for another process, which last `limit_seconds` at most where that one makes no progress.
    """

    job: str = ""
    say: Callable[[str], None] = print
    limit_seconds: float = 120.0


def stage(
    uri: str,
    split: str,
    staging_folder: Path | str | None = None,
    manifest: Manifest | None = None,
    staging: Staging | None = None,
) -> StagedSplit:
    """The split on this node, copied once: the first process under a file lock copies, the others wait and map.

    A part is checked against the manifest's SHA-256 while it is copied. What is there already is held against the
    manifest too, row by row, once in each job, and copied again if it differs.
    """
    manifest = manifest or read_manifest(uri)
    path = staging_area(manifest, staging_folder) / f"{split}.arrow"
    files = manifest.splits[split]["files"]
    once_per_node(
        path,
        make=lambda part: copy_split(uri, split, manifest, part),
        is_right=lambda there: has_rows(there, files),
        staging=staging,
    )
    return StagedSplit(path)


def once_per_node(
    path: Path, make: Callable[[Path], object], is_right: Callable[[Path], bool], staging: Staging | None = None
) -> Path:
    """Lets one process per node make a file in a private folder; `make` gets a name of its own, renamed when it is
    whole. What is there already is used if `is_right` says so.

    NAME.sha256 beside it says which job has found it right, and what it was then (identity): to read gigabytes again
    in every process of a job takes seconds each.
    """
    staging = staging or Staging()
    seen, part = path.with_name(path.name + ".sha256"), path.with_name(f"{path.name}.part-{os.getpid()}")

    def progress() -> list[int]:
        return [file.lstat().st_size for file in sorted(path.parent.glob(f"{path.name}.part-*"))]

    try:
        with one_at_a_time(path, staging.limit_seconds, staging.say, progress):
            keep_own(path, seen, part)
            known = seen.read_bytes() if seen.exists() else b""
            if path.exists():
                if staging.job and known == f"{staging.job} {identity(path)}".encode():
                    return path
                there = is_right(path)
            else:
                there = False
            if not there:
                remove_parts(path)
                try:
                    make(part)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
            seen.write_text(f"{staging.job} {identity(path)}")
            time.sleep(0.02)  # a file system's clock ticks every few ms: a later write must find it further on
    except OSError as error:
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.exists() else 0
        raise UserError(
            f"cannot stage {path} on this node: {error} ({free} MiB free); make room or set --staging-folder"
        ) from error
    return path


def remove_parts(path: Path) -> None:
    """Removes what processes that are no more have left half made."""
    for part in path.parent.glob(f"{path.name}.part-*"):
        pid = re.search(r"\.part-(\d+)", part.name)
        if not pid or not Path(f"/proc/{pid[1]}").exists():
            part.unlink(missing_ok=True)


def identity(path: Path) -> str:
    """What is another one after any write to a local file, and after a start of the machine: a crash loses writes."""
    boot, info = Path("/proc/sys/kernel/random/boot_id"), path.stat()
    start = boot.read_text().strip() if boot.exists() else uuid.uuid4().hex  # unknown: never the same again
    return f"{start} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def rows_sha256(batches: Iterable[pa.RecordBatch]) -> str:
    """SHA-256 (hex) of rows in any number of batches with the columns bytes, path and label of STAGED."""
    digests = {name: hashlib.sha256() for name in ("label", "length", "bytes", "path length", "path")}
    for batch in batches:
        digests["label"].update(np.ascontiguousarray(batch["label"].to_numpy(), "<i8").data)
        for name in ("bytes", "path"):
            column = batch[name].cast(pa.large_binary())
            _, offsets, data = column.buffers()
            ends = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)
            digests["length" if name == "bytes" else "path length"].update(
                np.ascontiguousarray(np.diff(ends), "<i8").data
            )
            digests[name].update(memoryview(data or b"")[ends[0] : ends[-1]])
    return hashlib.sha256(b"".join(digest.digest() for digest in digests.values())).hexdigest()


def has_rows(path: Path, files: list[dict[str, Any]]) -> bool:
    """Whether the staged file holds just the rows that the manifest's files have."""
    try:
        staged = pa.ipc.open_file(pa.memory_map(str(path)))
        if staged.schema != STAGED:
            return False
        batches = [staged.get_batch(i) for i in range(staged.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
            if any(column.null_count for column in batch.columns):
                return False
    except (pa.ArrowException, OSError, ValueError):
        return False
    places = iter(batches)
    for file in files:
        mine: list[pa.RecordBatch] = []
        while sum(map(len, mine)) < file["num_rows"]:
            batch = next(places, None)
            if batch is None:
                return False
            mine.append(batch)
        if rows_sha256(mine) != file["rows_sha256"]:
            return False
    return next(places, None) is None


def staged_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches of the Parquet files' columns, image and label, as STAGED has them."""
    for batch in batches:
        image = batch["image"]
        columns = [image.field("bytes").cast(pa.large_binary()), image.field("path"), batch["label"]]
        yield pa.record_batch(columns, schema=STAGED)


def copy_split(uri: str, split: str, manifest: Manifest, path: Path) -> None:
    """Parquet files -> one Arrow file of ROWS_PER_GROUP-row batches with columns bytes, path and label.

    What the manifest says of the files and their rows is held against them: it may have been edited and sealed again.
    """
    data = Folder(uri)
    local = path.with_name(path.name + ".parquet")
    per_class, others = np.zeros(manifest.num_classes, int), []
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, STAGED) as writer:
            for file in manifest.splits[split]["files"]:
                where = join_uri(uri, file["name"])
                try:
                    sha256 = data.download(file["name"], local)
                except FileNotFoundError:
                    raise UserError(
                        f"{where} is named in the manifest but missing; prepare the data set again"
                    ) from None
                if sha256 != file["sha256"] or local.stat().st_size != file["num_bytes"]:
                    raise UserError(f"{where} does not match the manifest's checksum; prepare the data set again")
                rows_digest, num_rows, names = copy_rows(local, where, writer, per_class)
                same_rows = (rows_digest, num_rows) == (file["rows_sha256"], file["num_rows"])
                if not same_rows or names not in (None, manifest.class_names):
                    others.append(where)
    finally:
        local.unlink(missing_ok=True)
    num_rows = int(per_class.sum())
    if num_rows != manifest.num_rows(split):
        raise UserError(
            f"{uri}: {num_rows} {split} rows were found, the manifest says {manifest.num_rows(split)}; prepare the "
            "data set again"
        )
    if others or per_class.tolist() != manifest.splits[split]["num_rows_per_class"]:
        where = others[0] if others else f"the {split} split of {uri}"
        raise UserError(f"{where} has other rows or class names than the manifest says; prepare the data set again")


def written(
    batches: Iterable[pa.RecordBatch], writer: pa.RecordBatchFileWriter, per_class: np.ndarray, where: str
) -> Iterator[pa.RecordBatch]:
    """The batches as they are written; counts their labels into `per_class` (int [num_classes])."""
    for batch in batches:
        labels = batch["label"].to_numpy()
        if labels.min() < 0 or labels.max() >= len(per_class):
            raise UserError(f"{where} has labels outside 0 to {len(per_class) - 1}; prepare it again")
        writer.write_batch(batch)
        per_class += np.bincount(labels, minlength=len(per_class))
        yield batch


def copy_rows(
    local: Path, where: str, writer: pa.RecordBatchFileWriter, per_class: np.ndarray
) -> tuple[str, int, list[str] | None]:
    """Copies a Parquet file's rows; returns their SHA-256, their number and the class names in the file's Hugging Face
    metadata, None if it has none. Raises UserError for another kind of file."""
    before = int(per_class.sum())
    try:
        file = pq.ParquetFile(local)
        digest = rows_sha256(written(staged_batches(file.iter_batches(ROWS_PER_GROUP)), writer, per_class, where))
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
        names = from_json(metadata)["info"]["features"]["label"]["names"] if metadata else None
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of this node: Arrow's own, of a damaged file, have no number
        raise UserError(f"{where} is no Parquet file of images and labels ({error}); prepare it again") from error
    return digest, int(per_class.sum()) - before, names
