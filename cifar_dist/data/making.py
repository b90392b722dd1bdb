"""Makes one part of a data set: reads and checks its pictures and writes them as a Parquet file."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cifar_dist.data.card import FACTS
from cifar_dist.data.check import Checker, Picture, pixels_sha256
from cifar_dist.data.near_duplicates import perceptual_hash
from cifar_dist.data.parts import Made, Part
from cifar_dist.data.sources.picture import Shown, encode_png, show
from cifar_dist.data.sources.source import Read
from cifar_dist.data.sources.trees import need_small
from cifar_dist.data.staged import ROWS_PER_GROUP, RowsDigest, staged_batches
from cifar_dist.errors import UserError
from cifar_dist.new_file import NewFile
from cifar_dist.sealed_json import seal, to_json
from cifar_dist.storage import Folder

BYTES_PER_GROUP = 4 << 20  # of encoded pictures in a Parquet row group, which is held in memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checked picture: a file that decodes to RGB, its kind, and what else is known of it for the data card."""

    encoded: bytes
    path: str
    label: int
    encoding: str
    height: int
    width: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DeepPictures:
    """Counts pictures with 16 bits a sample. If their values span a narrow range, few 8-bit levels are left."""

    num_pictures: int = 0
    largest: int = -1
    where: str = ""  # the picture with the largest value

    def add(self, where: str, largest: int, num_pictures: int = 1) -> None:
        self.num_pictures += num_pictures
        if (largest, self.where) > (self.largest, where) or self.largest < 0:
            self.largest, self.where = largest, where

    def warning(self) -> str | None:
        """Returns a warning if no 16-bit picture uses a quarter of the range, else None."""
        if not self.num_pictures or self.largest >= 65536 // 4:
            return None
        return (
            f"{self.where} has the largest value of the {self.num_pictures} 16-bit images, {self.largest} of 65535, so "
            f"{max(self.largest, 0) // 257 + 1} of 256 levels of brightness are left as 8 bits; scale the images to "
            "the full 16-bit range or to 8 bits, and prepare them again"
        )


def make_part(part: Part, uri: str, checker: Checker, passed: Callable[[int], None] = lambda _: None) -> Made:
    """Reads the part's pictures, checks them and writes PREPARING/part-KEY.parquet, .facts and, last, .json.

    Calls `passed` with the number of pictures that are done. Raises UserError for a picture that is not sound, or with
    `skip_bad` notes it."""
    folder, found = Folder(uri), Found()
    name, writer = f"{part.name}.parquet", None
    try:
        for rows in groups(checked_rows(part, checker, found, passed)):
            writer = writer or FileWriter(folder, name, part.class_names)
            writer.add(rows)
            found.add(rows)
        file = writer.close() if writer else None
    except BaseException:
        if writer:
            writer.give_up()
        raise
    buffer = pa.BufferOutputStream()
    pq.write_table(found.table(), buffer)
    facts = buffer.getvalue().to_pybytes()
    folder.write(f"{part.name}.facts", facts)
    made = Made(
        key=part.key,
        file=file,
        facts_sha256=hashlib.sha256(facts).hexdigest(),
        num_rows_per_class=np.bincount(found.labels(), minlength=len(part.class_names)).tolist(),
        encodings=sorted(found.stored),
        heights=found.range_of("height"),
        widths=found.range_of("width"),
        bad=found.bad,
        deep=asdict(found.deep),
    )
    folder.write(f"{part.name}.json", to_json(seal(asdict(made))))
    return made


class ReadFault(UserError):
    """A picture that could not be read now, because of its disk, its network or its rights: it may be sound."""


class Found:
    """What is found out about a part's pictures."""

    def __init__(self) -> None:
        self.bad: list[dict[str, Any]] = []
        self.deep = DeepPictures()
        self.stored: set[str] = set()
        self._facts: list[pa.Table] = []

    def add(self, rows: list[Row]) -> None:
        self.stored |= {row.encoding for row in rows}
        facts = [{**row.facts, "path": row.path, "label": row.label} for row in rows]
        for row, fact in zip(rows, facts, strict=True):
            size = {"height": row.height, "width": row.width, "num_bytes": len(row.encoded)}
            fact |= {**size, "stored_as_png": row.encoding == "PNG" != fact["encoding"]}
        self._facts.append(pa.Table.from_pylist(facts, schema=FACTS))

    def table(self) -> pa.Table:
        return pa.concat_tables(self._facts) if self._facts else FACTS.empty_table()

    def labels(self) -> np.ndarray:
        return self.table()["label"].to_numpy()

    def range_of(self, name: str) -> list[int]:
        values = self.table()[name].to_numpy()
        return [int(values.min()), int(values.max())] if len(values) else []


def checked_rows(part: Part, checker: Checker, found: Found, passed: Callable[[int], None]) -> Iterator[Row]:
    """Yields the part's checked rows. A bad picture raises UserError, or with `skip_bad` is noted."""
    for picture, sound in checker.checked(pictures_of(part, found, passed)):
        row = picture.owner
        if not sound:  # DALI shows it otherwise than Pillow, so what Pillow shows is stored
            shown = show(row.encoded, row.path, part.rules)
            assert shown.pixels is not None
            row = replace(row, encoded=encode_png(shown.pixels), encoding="PNG")
        yield row


def pictures_of(part: Part, found: Found, passed: Callable[[int], None]) -> Iterator[Picture[Row]]:
    names, rows, labels = (part.items[name].to_pylist() for name in ("name", "at", "label"))
    for name, at, label, read in zip(names, rows, labels, part.reader.reads(part.items), strict=True):
        picture = None
        try:
            picture = picture_of(read, label, part, found)
        except ReadFault:
            raise
        except UserError as error:
            if not part.skip_bad:
                raise UserError(f"{error}; mend or remove it, or leave such files out with --skip-bad") from error
            found.bad.append({"path": name or f"row-{at}", "reason": str(error), "label": label})
        passed(1)
        if picture:
            yield picture


def picture_of(read: Read, label: int, part: Part, found: Found) -> Picture[Row]:
    """Reads a picture. Raises UserError if it is not sound, ReadFault if that cannot be told."""
    try:
        content = read()
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise ReadFault(f"{error}; --skip-bad does not leave it out, as it may be sound: try again") from error
        raise
    if isinstance(content.data, np.ndarray):
        height, width = content.data.shape[:2]
        shown = Shown(content.data, "raw pixels", height, width, is_odd=True)
    else:
        need_small(content.where, len(content.data))
        shown = show(content.data, content.where, part.rules)
    if shown.largest is not None:
        found.deep.add(content.where, shown.largest)
    digest = pixels_sha256(shown.pixels) if shown.pixels is not None else None
    alike = perceptual_hash(shown.pixels) if shown.pixels is not None and part.near_duplicates else None
    facts = {
        "encoding": shown.encoding,
        "pixels_sha256": digest,
        "perceptual_hash": alike,
        "has_alpha": shown.has_alpha,
    }
    if shown.is_odd:
        assert shown.pixels is not None
        encoded = encode_png(shown.pixels)
    else:
        assert isinstance(content.data, bytes)
        encoded = content.data
    row = Row(
        encoded=encoded,
        path=content.path,
        label=label,
        encoding="PNG" if shown.is_odd else shown.encoding,
        height=shown.height,
        width=shown.width,
        facts=facts,
    )
    return Picture(encoded, (shown.height, shown.width), None if shown.is_odd else digest, row)


def groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yields the rows of one Parquet row group at a time: ROWS_PER_GROUP rows, or fewer if pictures are large."""
    group: list[Row] = []
    num_bytes = 0
    for row in rows:
        if group and (len(group) == ROWS_PER_GROUP or num_bytes + len(row.encoded) > BYTES_PER_GROUP):
            yield group
            group, num_bytes = [], 0
        group.append(row)
        num_bytes += len(row.encoded)
    if group:
        yield group


class FileWriter:
    """Writes rows as a Parquet file in the Hugging Face layout, group by group."""

    def __init__(self, folder: Folder, name: str, class_names: list[str]) -> None:
        features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
        self._schema = pa.schema(
            [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        self._file = NewFile(folder, name)
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._file, "w"), self._schema, compression="none", use_dictionary=False
        )
        self._rows_digest, self._num_rows = RowsDigest(), 0

    def add(self, rows: list[Row]) -> None:
        images = [{"bytes": row.encoded, "path": row.path} for row in rows]
        table = pa.table({"image": images, "label": [row.label for row in rows]}, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(rows))
        for batch in staged_batches(table.to_batches()):
            self._rows_digest.add(batch)
        self._num_rows += len(rows)

    def close(self) -> dict[str, Any]:
        """Completes the file. Returns its part of the manifest, without a name."""
        self._writer.close()
        num_bytes, sha256 = self._file.finish()
        return {
            "num_rows": self._num_rows,
            "num_bytes": num_bytes,
            "sha256": sha256,
            "rows_sha256": self._rows_digest.hexdigest(),
        }

    def give_up(self) -> None:
        self._file.give_up()
