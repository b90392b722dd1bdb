"""A data set at rest (Parquet and a manifest) and staged (an Arrow file on the node, memory-mapped)."""

import bisect
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.private import default_folder, keep_own, one_at_a_time, private_folder, user_folder
from cifar_dist.data.sources import Row, Source
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, file_sha256, from_json, is_sealed, is_texts, join_uri, seal, to_json

FORMAT_VERSION = 2
ROWS_PER_FILE = 10_000
BYTES_PER_FILE = 256 << 20
ROWS_PER_GROUP = 1_000  # also the rows of one Arrow batch: staging holds one in memory
PREPARING = ".cifar_dist-preparing"
REPLACED = "_manifest.json.replaced"  # in PREPARING, the manifest of the data set that is being replaced
DATA_FILE = re.compile(r"(train|validation|test)-\d{5}\.parquet")
UNFINISHED = re.compile(  # in PREPARING
    rf"({DATA_FILE.pattern}|_manifest\.json(\.replaced)?|start-[0-9a-f]{{8}})(\.[0-9a-f]{{8}}\.tmp)?"
)
MANIFEST = "_manifest.json"  # Arrow and Spark, reading a whole folder, skip names that begin with _
OLD_MANIFEST = "manifest.json"
STAGED = pa.schema([("bytes", pa.large_binary()), ("path", pa.string()), ("label", pa.int64())])


@dataclass(frozen=True)
class Manifest:
    """The data set's manifest file.

    `splits[name]` holds num_rows, num_rows_per_class, encodings, the heights and widths [least, most] in pixels, and
    the files with the number of their rows, their SHA-256 and that of the rows (rows_sha256); `sha256` is that of all
    the rest.
    """

    format_version: int
    source: str
    class_names: list[str]
    splits: dict[str, dict[str, Any]]
    num_skipped: int
    sha256: str = ""

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
        values = from_json(Folder(uri).read(MANIFEST))
        version = values["format_version"]
        if version == FORMAT_VERSION:
            manifest = Manifest(**values)
            damaged = not is_sealed(values)
            if not damaged:
                check_words(manifest)
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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} is damaged ({error!r}); prepare the data set again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}, this program reads {FORMAT_VERSION}; prepare it again")
    if damaged:
        raise UserError(f"{where} does not match its own checksum; prepare the data set again")
    return manifest


SPLIT_WORDS = {"num_rows", "num_rows_per_class", "encodings", "height", "width", "files"}
FILE_WORDS = {"name", "num_rows", "num_bytes", "sha256", "rows_sha256"}


def check_words(manifest: Manifest) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError for what prepare does not write, whoever sealed it.

    copy_split holds the numbers against the files.
    """
    names = manifest.class_names
    if not is_texts(names) or not names:
        raise ValueError("class_names is no list of names")
    if type(manifest.source) is not str or not is_count(manifest.num_skipped):
        raise ValueError("source or num_skipped")
    splits = manifest.splits
    if not {"train", "test"} <= splits.keys() <= {"train", "validation", "test"}:
        raise ValueError(f"its splits are {', '.join(splits)}, not train and test")
    for name, split in splits.items():
        sizes, per_class = (split["height"], split["width"]), split["num_rows_per_class"]
        for numbers, count in ((per_class, manifest.num_classes), *((size, 2) for size in sizes)):
            if type(numbers) is not list or len(numbers) != count or not all(map(is_count, numbers)):
                raise ValueError(f"num_rows_per_class, height or width of {name}")
        if split.keys() != SPLIT_WORDS or not is_texts(split["encodings"]) or not all(0 < a <= b for a, b in sizes):
            raise ValueError(f"the words of {name}")
        for i, file in enumerate(split["files"]):
            digests = file["sha256"], file["rows_sha256"]
            if file.keys() != FILE_WORDS or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
                raise ValueError(f"the files of {name}")
            if file["name"] != f"{name}-{i:05d}.parquet":
                raise ValueError(f"file {i} of {name} has the name {file['name']!r}")
            if not all(is_count(file[key]) and file[key] for key in ("num_rows", "num_bytes")):
                raise ValueError(f"num_rows or num_bytes of {file['name']}")
        if not is_count(split["num_rows"]):
            raise ValueError(f"num_rows of {name}")


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def has_old_manifest(folder: Folder) -> bool:
    """Whether the folder has a manifest under its earlier name. Other programs write files of that name too: the keys
    tell."""
    try:
        found = from_json(folder.read(OLD_MANIFEST))
    except (FileNotFoundError, ValueError):
        return False
    return found.keys() == {field.name for field in fields(Manifest)}


def prepare(
    source: Source,
    uri: str,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[Iterable[Row], str, int], Iterable[Row]] = lambda rows, _split, _total: rows,
) -> tuple[Manifest, bool]:
    """Writes the source as a data set; returns its manifest and whether anything was written.

    All is written in a folder PREPARING and moved when it is whole, the manifest last. A data set that is already
    there is left alone if it is equal and whole, and replaced by another only with `overwrite`, as are files of the
    same names that no manifest names.
    """
    folder = Folder(uri)
    try:
        old_name = has_old_manifest(folder)
        has_manifest = folder.exists(MANIFEST) or old_name
        old = read_manifest(uri) if has_manifest and not overwrite else None
    except UserError as error:
        raise UserError(f"{error} with --overwrite") from error
    clear_unfinished(folder)
    if not overwrite and (strange := [name for name in data_files(folder) if name not in file_names(old)]):
        raise UserError(
            f"{join_uri(uri, strange[0])} is in the way: no data set of this program names it, so it is left alone; "
            "use another --out, or --overwrite to replace such files"
        )
    folder.create(PREPARING)
    mine = f"{PREPARING}/start-{uuid.uuid4().hex[:8]}"
    folder.write(mine, b"")
    seen = folder.exists(MANIFEST), data_files(folder)
    source.forget()
    moving = False
    try:
        splits = {}
        for split in source.splits:
            rows = progress(source.rows(split, skip_bad), split, len(source.splits[split]))
            splits[split] = write_split(folder, split, iter(rows), source.class_names)
        manifest = Manifest(FORMAT_VERSION, source.name, source.class_names, splits, len(source.skipped))
        manifest = Manifest(**seal(asdict(manifest)))
        same = old is not None and old.sha256 == manifest.sha256
        if same and is_whole(folder, manifest):
            return manifest, False
        if old is not None and not same:
            raise UserError(f"{uri} already holds another data set ({old.source}); use --overwrite or another --out")
        replaced = data_files(folder)
        if not folder.exists(mine) or seen != (folder.exists(MANIFEST), replaced):
            raise UserError(f"another job has written to {uri} meanwhile; run the same command again")
        folder.write(f"{PREPARING}/{MANIFEST}", to_json(asdict(manifest)))  # clear_unfinished goes by it
        moving = True
        for name in [MANIFEST, *[OLD_MANIFEST] * old_name]:
            if folder.exists(name):
                folder.move(name, f"{PREPARING}/{REPLACED}")
        for name in replaced:
            folder.delete(name)
        for name in file_names(manifest):
            folder.move(f"{PREPARING}/{name}", name)
        folder.write(MANIFEST, to_json(asdict(manifest)))
        moving = False
        return manifest, True
    except FileNotFoundError as error:
        raise UserError(f"{error} while {uri} was written; is another job preparing the same folder?") from error
    finally:
        source.checker.stop()
        if not moving and folder.exists(mine):  # else it is another job's by now
            folder.delete(PREPARING)


def data_files(folder: Folder) -> list[str]:
    """What in the folder has the name of a data set's file."""
    return [name for name in folder.names() if DATA_FILE.fullmatch(name)]


def file_names(manifest: Manifest | None) -> list[str]:
    return [file["name"] for split in manifest.splits.values() for file in split["files"]] if manifest else []


def clear_unfinished(folder: Folder) -> None:
    """Removes what an earlier prepare that was cut off has left: PREPARING, and the files that it had moved out of it.

    Raises UserError where PREPARING holds what prepare does not write.
    """
    inside = folder.names(PREPARING)
    if strange := [n for n in inside if not UNFINISHED.fullmatch(n)]:
        raise UserError(
            f"{join_uri(folder.uri, PREPARING, strange[0])} is in the way: this program did not write it; remove it, "
            "or use another --out"
        )
    if MANIFEST in inside and not folder.exists(MANIFEST):  # it was moving
        known = {sha256 for name in {MANIFEST, REPLACED} & set(inside) for sha256 in checksums(folder, name)}
        for name in data_files(folder):
            if sha256_of(folder, name) in known:
                folder.delete(name)
    folder.delete(PREPARING)


def checksums(folder: Folder, name: str) -> set[str]:
    """The SHA-256 of each file that a manifest in PREPARING names; empty if the manifest is damaged."""
    try:
        splits = from_json(folder.read(f"{PREPARING}/{name}"))["splits"]
        return {file["sha256"] for split in splits.values() for file in split["files"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return set()


def whole(uri: str, source: str) -> Manifest | None:
    """The manifest of the data set that was prepared from a source of that name, if it is there and whole."""
    folder = Folder(uri)
    if not folder.exists(MANIFEST):
        return None
    manifest = read_manifest(uri)
    return manifest if manifest.source == source and is_whole(folder, manifest) else None


def is_whole(folder: Folder, manifest: Manifest) -> bool:
    """Whether every file that the manifest names is there with its checksum."""
    files = [file for split in manifest.splits.values() for file in split["files"]]
    there = set(folder.names())
    return all(f["name"] in there and sha256_of(folder, f["name"]) == f["sha256"] for f in files)


def sha256_of(folder: Folder, name: str) -> str:
    """SHA-256 of a file of the data set (hex), empty for a link that leads nowhere."""
    with contextlib.suppress(FileNotFoundError):
        if folder.is_local:  # without holding it in memory
            return folder.tried("read", name, lambda: file_sha256(Path(folder.at(name))))
        return hashlib.sha256(folder.read(name)).hexdigest()
    return ""


def write_split(folder: Folder, split: str, rows: Iterator[Row], class_names: list[str]) -> dict[str, Any]:
    """Writes PREPARING/SPLIT-*.parquet in the Hugging Face layout; returns the split's part of the manifest."""
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
