"""The manifest of a data set: its contents, with the checksums of its files."""

import re
from dataclasses import dataclass, fields
from typing import Any

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, is_sealed, is_texts
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

FORMAT_VERSION = 2
MANIFEST = "_manifest.json"  # Arrow and Spark skip names that begin with _ when they read a folder
OLD_MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The data set's manifest file.

    `splits[name]` holds num_rows, num_rows_per_class, encodings, height and width ([least, most] in pixels), and
    files. A file has its number of rows, its size in bytes, its SHA-256 and that of its rows (rows_sha256). `sha256` is
    the checksum of all other fields.
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

    @property
    def has_validation(self) -> bool:
        """Whether the data set has a validation split of its own. Else each run draws its own from train."""
        return "validation" in self.splits

    @property
    def training_splits(self) -> tuple[str, ...]:
        """The stored splits that training reads."""
        return ("train", "validation") if self.has_validation else ("train",)

    def image_shape(self, split: str) -> tuple[int, int] | None:
        """(height, width) in pixels if all images of the split share it, else None."""
        (low_h, high_h), (low_w, high_w) = self.splits[split]["height"], self.splits[split]["width"]
        return (low_h, low_w) if low_h == high_h and low_w == high_w else None


def read_manifest(uri: str) -> Manifest:
    """Returns the data set's manifest. Raises UserError if it is missing, damaged or of another version."""
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
    """Raises ValueError, TypeError, KeyError or AttributeError for values that prepare does not write, even if sealed.

    copy_split compares the numbers with the files.
    """
    names = manifest.class_names
    if not is_texts(names) or not names:
        raise ValueError("class_names is no list of names")
    if type(manifest.source) is not str or not is_count(manifest.num_skipped):
        raise ValueError("source or num_skipped")
    splits = manifest.splits
    if not {"train", "test"} <= splits.keys() <= set(SPLITS):
        raise ValueError(f"its splits are {', '.join(splits)}, not train and test")
    for name, split in splits.items():
        check_split(name, split, manifest.num_classes)


def check_split(name: str, split: dict[str, Any], num_classes: int) -> None:
    """Checks one split like check_words."""
    sizes = split["height"], split["width"]
    for numbers, count in ((split["num_rows_per_class"], num_classes), *((size, 2) for size in sizes)):
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
    """Whether the folder has a manifest under its earlier name. The keys tell it from other programs' files."""
    try:
        found = from_json(folder.read(OLD_MANIFEST))
    except (FileNotFoundError, ValueError):
        return False
    return found.keys() == {field.name for field in fields(Manifest)}
