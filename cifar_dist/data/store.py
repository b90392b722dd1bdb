"""A data set at rest (Parquet and a manifest) and staged (an Arrow file on the node, memory-mapped)."""

import bisect
import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from cifar_dist.data.sources import Row, Source
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, file_sha256, join_uri, to_json

FORMAT_VERSION = 1
ROWS_PER_FILE = 10_000
BYTES_PER_FILE = 256 << 20
ROWS_PER_GROUP = 1_000  # also the rows of one Arrow batch: staging holds one in memory
PREPARING = ".preparing"
MANIFEST = "_manifest.json"  # Arrow and Spark, reading a whole folder, skip names that begin with _
OLD_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The data set's manifest file.

    `splits[name]` holds num_rows, num_rows_per_class, encodings, the heights and widths [least, most] in pixels, and
    the files with their rows and SHA-256; `sha256` is that of all the rest.
    """

    format_version: int
    source: str
    class_names: list[str]
    splits: dict[str, dict[str, Any]]
    num_skipped: int
    sha256: str = ""

    def digest(self) -> str:
        return hashlib.sha256(to_json({**asdict(self), "sha256": ""})).hexdigest()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def num_rows(self, split: str) -> int:
        return self.splits[split]["num_rows"]

    def image_shape(self, split: str) -> tuple[int, int] | None:
        """(height, width) in pixels if all images of the split share it, else None."""
        (low_h, high_h), (low_w, high_w) = self.splits[split]["height"], self.splits[split]["width"]
        return (low_h, low_w) if low_h == high_h and low_w == high_w else None


def read_manifest(uri: str) -> Manifest:
    """The data set's manifest. Raises UserError if there is none, or one that is damaged or of another version."""
    where = join_uri(uri, MANIFEST)
    try:
        values = json.loads(Folder(uri).read(MANIFEST))
        version = values["format_version"]
        if version == FORMAT_VERSION:
            manifest = Manifest(**values)
            _ = [manifest.splits[name]["files"] for name in ("train", "test")]
            damaged = manifest.sha256 != manifest.digest()
    except FileNotFoundError:
        if has_old_manifest(Folder(uri)):
            raise UserError(
                f"{uri} is of an earlier version; rename its {OLD_MANIFEST} to {MANIFEST}, or prepare it again"
            ) from None
        raise UserError(f"{uri} is no data set: it has no {MANIFEST}; make one with jobs/prepare.py") from None
    except UserError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            raise UserError(f"{uri} is no data set: it is a file; make one with jobs/prepare.py") from error
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error!r}); prepare the data set again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    if damaged:
        raise UserError(f"{where} does not match its own checksum; prepare the data set again")
    return manifest


def has_old_manifest(folder: Folder) -> bool:
    """Whether the folder has a manifest under its earlier name. Other programs write files of that name too: the keys
    tell."""
    try:
        found = json.loads(folder.read(OLD_MANIFEST))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() == {field.name for field in fields(Manifest)}


def prepare(
    source: Source,
    uri: str,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[Iterable[Row], str, int], Iterable[Row]] = lambda rows, _split, _total: rows,
) -> tuple[Manifest, bool]:
    """Writes the source as a data set; returns its manifest and whether anything was written.

    All is written in a folder .preparing and moved when it is whole, the manifest last. A data set that is already
    there is left alone if it is equal and whole, and replaced by another only with `overwrite`.
    """
    folder = Folder(uri)
    try:
        old_name = has_old_manifest(folder)
        has_manifest = folder.exists(MANIFEST) or old_name
        old = read_manifest(uri) if has_manifest and not overwrite else None
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from error
    folder.delete(PREPARING)
    folder.create(PREPARING)
    source.skipped.clear()
    try:
        splits = {}
        for split in source.splits:
            rows = progress(source.rows(split, skip_bad), split, len(source.splits[split]))
            splits[split] = write_split(folder, split, iter(rows), source.class_names)
        manifest = Manifest(FORMAT_VERSION, source.name, source.class_names, splits, len(source.skipped))
        manifest = Manifest(**{**asdict(manifest), "sha256": manifest.digest()})
        same = old is not None and old.sha256 == manifest.sha256
        if same and is_whole(folder, manifest):
            return manifest, False
        if old is not None and not same:
            raise UserError(f"{uri} already holds another data set ({old.source}); use --overwrite or another --out")
        folder.delete(MANIFEST)
        if old_name:
            folder.delete(OLD_MANIFEST)
        for name in folder.names():  # of an older data set or of a write that was cut off; nobody else's files
            if re.fullmatch(r"(train|test)-\d{5}\.parquet", name):
                folder.delete(name)
        for name in [file["name"] for s in splits.values() for file in s["files"]]:
            folder.move(f"{PREPARING}/{name}", name)
        folder.write(MANIFEST, to_json(asdict(manifest)))
        return manifest, True
    except FileNotFoundError as error:
        raise UserError(f"{error} while {uri} was written; is another job preparing the same folder?") from error
    finally:
        folder.delete(PREPARING)


def is_whole(folder: Folder, manifest: Manifest) -> bool:
    """Whether every file that the manifest names is there with its checksum."""
    files = [file for split in manifest.splits.values() for file in split["files"]]
    there = set(folder.names())
    return all(f["name"] in there and hashlib.sha256(folder.read(f["name"])).hexdigest() == f["sha256"] for f in files)


def write_split(folder: Folder, split: str, rows: Iterator[Row], class_names: list[str]) -> dict[str, Any]:
    """Writes .preparing/SPLIT-*.parquet in the Hugging Face layout; returns the split's part of the manifest."""
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
        sha256 = hashlib.sha256(content).hexdigest()
        files.append({"name": name, "num_rows": len(chunk), "num_bytes": len(content), "sha256": sha256})
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
    """The rows of one file each: ROWS_PER_FILE, or fewer where images are large."""
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
    return Path(tempfile.gettempdir()) / "cifar_dist-staged"


def stage(
    uri: str, split: str, staging_folder: Path | str | None = None, manifest: Manifest | None = None
) -> StagedSplit:
    """The split on this node, copied once: the first process under a file lock copies, the others wait and map.

    A part is checked against the manifest's SHA-256 while it is copied. A staged file is checked against its own
    checksum when it is first opened after the machine's start or after any change to it (once_per_node), and copied
    again if it was damaged.
    """
    manifest = manifest or read_manifest(uri)
    folder = staging_area(manifest, staging_folder)
    return StagedSplit(once_per_node(folder / f"{split}.arrow", lambda path: copy_split(uri, split, manifest, path)))


def staging_area(manifest: Manifest, staging_folder: Path | str | None = None) -> Path:
    """The local folder of this data set, named by its checksum: another data set never shares it."""
    return Path(staging_folder or default_staging_folder()) / manifest.sha256[:16]


def once_per_node(path: Path, make: Callable[[Path], None]) -> Path:
    """Lets one process per node make a file; `make` gets a temporary name, renamed when it is whole.

    NAME.sha256 beside it holds its checksum and the file's identity when that was last found right: to read gigabytes
    again in every process takes seconds each.
    """
    checksum, part = path.with_name(path.name + ".sha256"), path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            sha256, _, seen = checksum.read_text().partition(" ") if checksum.exists() else ("", "", "")
            now = identity(path) if path.exists() else ""
            if now and seen == now:
                return path
            if not now or sha256 != file_sha256(path):
                try:
                    make(part)
                    sha256 = file_sha256(part)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)  # while the lock is held: later it may be another process's
                now = identity(path)
            checksum.write_text(f"{sha256} {now}")
            time.sleep(0.02)  # a file system's clock ticks every few ms: a later write must find it further on
    except OSError as error:
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.exists() else 0
        raise UserError(
            f"cannot stage {path} on this node: {error} ({free} MiB free); make room or set --staging-folder"
        ) from error
    return path


def identity(path: Path) -> str:
    """What is another one after any write to a local file, and after a start of the machine: a crash loses writes."""
    boot, info = Path("/proc/sys/kernel/random/boot_id"), path.stat()
    start = boot.read_text().strip() if boot.exists() else uuid.uuid4().hex  # unknown: never the same again
    return f"{start} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"


def copy_split(uri: str, split: str, manifest: Manifest, path: Path) -> None:
    """Parquet files -> one Arrow file of ROWS_PER_GROUP-row batches with columns bytes, path and label."""
    schema = pa.schema([("bytes", pa.large_binary()), ("path", pa.string()), ("label", pa.int64())])
    data = Folder(uri)
    local = path.with_name(path.name + ".parquet")
    num_rows = 0
    try:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for file in manifest.splits[split]["files"]:
                where = join_uri(uri, file["name"])
                try:
                    sha256 = data.download(file["name"], local)
                except FileNotFoundError:
                    raise UserError(
                        f"{where} is named in the manifest but missing; prepare the data set again"
                    ) from None
                if sha256 != file["sha256"]:
                    raise UserError(f"{where} does not match the manifest's checksum; prepare the data set again")
                try:
                    for batch in pq.ParquetFile(local).iter_batches(ROWS_PER_GROUP):
                        labels = batch["label"].to_numpy()
                        if labels.min() < 0 or labels.max() >= manifest.num_classes:
                            most = manifest.num_classes - 1
                            raise UserError(f"{where} has labels outside 0 to {most}; prepare it again")
                        image = batch["image"]
                        columns = [image.field("bytes").cast(pa.large_binary()), image.field("path"), batch["label"]]
                        writer.write_batch(pa.record_batch(columns, schema=schema))
                        num_rows += len(labels)
                except (pa.ArrowException, KeyError, AttributeError, TypeError) as error:
                    what = str(error).splitlines()[0]
                    raise UserError(
                        f"{where} is no Parquet file of images and labels ({what}); prepare it again"
                    ) from error
    finally:
        local.unlink(missing_ok=True)
    if num_rows != manifest.num_rows(split):
        raise UserError(f"{uri}: {num_rows} {split} rows were found, the manifest says {manifest.num_rows(split)}")
