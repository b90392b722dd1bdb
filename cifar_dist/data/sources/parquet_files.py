"""Parquet files in the Hugging Face layout."""

import re
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cifar_dist.data.sources.picture import Item
from cifar_dist.data.sources.source import DATA_SUFFIXES, Source, draw_test_split, need_two_classes
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, is_texts
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri


def parquet(path: str | None, test_fraction: float = 0.2, seed: int = 0) -> Source:
    """Reads train*.parquet and test*.parquet with the columns `image` (or `img`) {bytes, path} and `label`."""
    if not path:
        raise UserError("--source parquet needs --path, a folder of train-*.parquet and test-*.parquet")
    folder = Folder(path)
    names = [n for n in folder.names() if n.endswith(".parquet")]
    if not names and "data" in folder.names():
        refuse_unread(folder, {"data"})
        folder = Folder(join_uri(path, "data"))
        names = [n for n in folder.names() if n.endswith(".parquet")]
    tables = {split: [n for n in names if re.match(rf"{split}\b", n)] for split in ("train", "test")}
    if not tables["train"]:
        raise UserError(f"{path} holds no train*.parquet; --source parquet reads the Hugging Face layout")
    refuse_unread(folder, {name for files in tables.values() for name in files})
    loaded = {split: [read_parquet(folder, n) for n in files] for split, files in tables.items() if files}
    class_names = parquet_classes(path, [table for parts in loaded.values() for _, table in parts])
    need_two_classes(path, class_names)
    splits = {
        split: [item for name, table in parts for item in parquet_items(name, table, len(class_names))]
        for split, parts in loaded.items()
    }
    if "test" not in splits:
        splits = draw_test_split(splits["train"], class_names, test_fraction, seed)
    return Source(name="parquet", class_names=class_names, splits=splits)


def refuse_unread(folder: Folder, read: set[str]) -> None:
    """Raises UserError for a folder or a data file that is not in `read`."""
    inner = set(folder.folders())
    for name in folder.names():
        is_data = name in inner or Path(name).suffix.lower() in DATA_SUFFIXES
        if is_data and name not in read and not name.startswith((".", "_")):
            raise UserError(
                f"{join_uri(folder.uri, name)} would not be read: --source parquet reads train*.parquet and "
                "test*.parquet; rename it, or move it away"
            )


def read_parquet(folder: Folder, name: str) -> tuple[str, pa.Table]:
    """Returns (path, table with the columns image and label)."""
    where = join_uri(folder.uri, name)
    try:
        table = pq.read_table(folder.at(name), filesystem=folder.fs)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    image = next((c for c in ("image", "img") if c in table.column_names), None)
    if image is None or "label" not in table.column_names:
        found = ", ".join(table.column_names)
        raise UserError(f"{where} has the columns {found}; an image (bytes, path) and a label column are needed")
    kind, label_kind = table.schema.field(image).type, table.schema.field("label").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{where}: column {image} is {kind}; struct<bytes: binary, path: string> is needed")
    if not pa.types.is_integer(label_kind):
        raise UserError(f"{where}: column label is {label_kind}; integers are needed")
    columns = {"image": table[image], "label": table["label"]}
    return where, pa.table(columns).replace_schema_metadata(table.schema.metadata)


def parquet_classes(path: str, tables: list[pa.Table]) -> list[str]:
    """Returns class names from the Hugging Face metadata, or '0', '1', ... up to the largest label."""
    try:
        info = from_json((tables[0].schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has Hugging Face metadata that cannot be read ({error}); write it again") from error
    if names:
        if not is_texts(names):
            raise UserError(f"{path} has Hugging Face metadata whose class names are no list of names; write it again")
        return names
    labels = [value for table in tables for value in table["label"].to_pylist() if value is not None]
    largest = max(labels, default=-1)
    if not 0 <= largest < len(labels):
        raise UserError(f"{path} has {len(labels)} labels up to {largest}; each class from 0 on needs images")
    return [str(i) for i in range(largest + 1)]


def parquet_items(where: str, table: pa.Table, num_classes: int) -> list[Item]:
    content = pc.struct_field(table["image"], "bytes")
    has_paths = table.schema.field("image").type.get_field_index("path") >= 0
    paths = pc.struct_field(table["image"], "path") if has_paths else pa.nulls(len(table), pa.string())
    items = []
    for row, label in enumerate(table["label"].to_pylist()):
        if label is None or not 0 <= label < num_classes:
            raise UserError(f"{where} row {row} has the label {label}; 0 to {num_classes - 1} are valid")
        name = paths[row].as_py() or f"row-{row}"
        items.append(Item(name, label, partial(arrow_bytes, content, row), f"{where} row {row}"))
    return items


def arrow_bytes(column: pa.ChunkedArray, row: int) -> bytes:
    """Returns the row's image bytes. Does not follow paths to files outside the Parquet file."""
    return column[row].as_py() or b""
