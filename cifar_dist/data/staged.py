"""Stages a data set on a node: memory-mapped Arrow files, copied once per node and checked."""

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.private import Staging, default_folder, need_room, once_per_node, private_folder, user_folder
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri, join_uri

ROWS_PER_GROUP = 1_000  # of Parquet at most, and rows per Arrow batch: staging holds one group in memory
STAGED = pa.schema([("bytes", pa.large_binary()), ("path", pa.string()), ("label", pa.int64())])


def use_decoded(shape: tuple[int, int] | None, num_images: int, cache: str, budget_mib: int) -> bool:
    """Whether to keep decoded pixels, which take num_images x height x width x 3 bytes (uint8). Raises UserError."""
    if cache == "decoded" and shape is None:
        raise UserError("--cache decoded needs images of one size, these differ; use --cache auto or encoded")
    fits = shape is not None and num_images * shape[0] * shape[1] * 3 <= budget_mib << 20
    return cache == "decoded" or (cache == "auto" and fits)


class StagedSplit:
    """A split as memory-mapped Arrow. `encoded(i)` is a zero-copy view of image i's bytes (uint8 [num_bytes])."""

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
        """Returns the image's path in its source, for messages."""
        chunk, at = self._place(i)
        return self._paths[chunk][at].as_py()


def default_staging_folder() -> Path:
    """Returns the folder of this user's staged data without --staging-folder."""
    return user_folder(Path(default_folder()))


def staging_root(staging_folder: Path | str | None = None) -> Path:
    """Returns this user's folder of staged data, in `staging_folder` or in the temporary folder."""
    return user_folder(Path(staging_folder)) if staging_folder else default_staging_folder()


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A stored data set, and how this process stages it."""

    uri: str
    manifest: Manifest
    staging: Staging = field(default_factory=Staging)

    @staticmethod
    def open(uri: str, staging: Staging | None = None) -> "DataSet":
        """Opens the data set at `uri`. Raises UserError if it is missing or damaged."""
        uri = absolute_uri(uri)
        return DataSet(uri=uri, manifest=read_manifest(uri), staging=staging or Staging())

    @property
    def area(self) -> Path:
        """This user's local folder of the data set, named by its checksum, so that data sets never share a folder."""
        return private_folder(staging_root(self.staging.folder) / self.manifest.sha256[:16])

    def stage(self, split: str) -> StagedSplit:
        """Stages the split: the first process on a node copies it under a file lock, the others wait and map it.

        Copying checks each file against the manifest's SHA-256. Once per job, existing rows are compared with the
        manifest, and copied again if they differ.
        """
        path = self.area / f"{split}.arrow"
        files = self.manifest.splits[split]["files"]
        once_per_node(
            path,
            make=lambda part: copy_split(self.uri, split, self.manifest, part),
            is_right=lambda staged: has_rows(staged, files),
            staging=self.staging,
        )
        return StagedSplit(path)


class RowsDigest:
    """The SHA-256 of rows with STAGED's columns bytes, path and label, however split into batches."""

    def __init__(self) -> None:
        self._digests = {name: hashlib.sha256() for name in ("label", "length", "bytes", "path length", "path")}

    def add(self, batch: pa.RecordBatch) -> None:
        self._digests["label"].update(np.ascontiguousarray(batch["label"].to_numpy(), "<i8").data)
        for name in ("bytes", "path"):
            column = batch[name].cast(pa.large_binary())
            _, offsets, data = column.buffers()
            ends = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)
            lengths = self._digests["length" if name == "bytes" else "path length"]
            lengths.update(np.ascontiguousarray(np.diff(ends), "<i8").data)
            self._digests[name].update(memoryview(data or b"")[ends[0] : ends[-1]])

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(digest.digest() for digest in self._digests.values())).hexdigest()


def rows_sha256(batches: Iterable[pa.RecordBatch]) -> str:
    """Returns the RowsDigest (hex) of batches."""
    digest = RowsDigest()
    for batch in batches:
        digest.add(batch)
    return digest.hexdigest()


def has_rows(path: Path, files: list[dict[str, Any]]) -> bool:
    """Whether the staged file holds exactly the rows of the manifest's files."""
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
    remaining = iter(batches)
    for file in files:
        of_file: list[pa.RecordBatch] = []
        while sum(map(len, of_file)) < file["num_rows"]:
            batch = next(remaining, None)
            if batch is None:
                return False
            of_file.append(batch)
        if rows_sha256(of_file) != file["rows_sha256"]:
            return False
    return next(remaining, None) is None


def staged_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Converts batches with the Parquet files' columns, image and label, to the schema STAGED."""
    for batch in batches:
        image = batch["image"]
        columns = [image.field("bytes").cast(pa.large_binary()), image.field("path"), batch["label"]]
        yield pa.record_batch(columns, schema=STAGED)


def copy_split(uri: str, split: str, manifest: Manifest, path: Path) -> None:
    """Copies Parquet files into one Arrow file with the schema STAGED, in batches of ROWS_PER_GROUP rows.

    Compares files and rows with the manifest, which may have been edited and sealed again. Raises UserError if they
    differ.
    """
    data, files = Folder(uri), manifest.splits[split]["files"]
    sizes = [file["num_bytes"] for file in files]
    need_room(
        path, sum(sizes) + max(sizes, default=0), f"a copy of the {split} split of {uri}"
    )  # and one file as it is read
    local = path.with_name(path.name + ".parquet")
    per_class, others = np.zeros(manifest.num_classes, int), []
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, STAGED) as writer:
            for file in files:
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
    """Writes the batches and yields them. Adds the counts of their labels to `per_class` (int [num_classes])."""
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
    """Copies a Parquet file's rows. Returns (their SHA-256, their number, class names).

    The class names come from the file's Hugging Face metadata, None without metadata. Raises UserError if the file is
    of another kind."""
    before = int(per_class.sum())
    try:
        file = pq.ParquetFile(local)
        batches = (batch for i in range(file.num_row_groups) for batch in file.read_row_group(i).to_batches())
        digest = rows_sha256(written(staged_batches(batches), writer, per_class, where))
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface")
        names = from_json(metadata)["info"]["features"]["label"]["names"] if metadata else None
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of this node: Arrow's errors about a damaged file have no errno
        raise UserError(f"{where} is no Parquet file of images and labels ({error}); prepare it again") from error
    return digest, int(per_class.sum()) - before, names
