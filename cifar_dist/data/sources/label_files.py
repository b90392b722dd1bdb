"""A table of labels beside the pictures: CSV, TSV or JSON lines with a path and a label a row."""

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cifar_dist.data.manifest import SPLITS
from cifar_dist.data.sources.columns import LABEL_NAMES, ROW_NAMES
from cifar_dist.data.sources.labels import Labels, numbered
from cifar_dist.data.sources.names import PICTURES, SPLIT_OF, LeftOut, listing, suffix_of
from cifar_dist.data.sources.pictures import Pictures, pictures_of, table_of
from cifar_dist.data.sources.source import FileReader, Source, need_two_classes
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.errors import UserError
from cifar_dist.options import nearest
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri, split_uri

PATH_NAMES = (
    "path",
    "file_name",
    "filename",
    "file",
    "filepath",
    "image",
    "img",
    "image_path",
    "image_id",
    "id",
    "name",
)
SPLIT_NAMES = ("split", "set", "subset", "fold")
TABLE_SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson"}
FOUND_BY_ITSELF = ("metadata.csv", "metadata.jsonl", "labels.csv", "labels.jsonl")  # without class folders
SEVERAL = -1  # as a position
UNNAMED = "pictures that no table of labels names"


class LabelTable(NamedTuple):
    """The rows of a table of labels: number of the line, path, label and split ('' if it names none)."""

    lines: list[int]
    paths: list[str]
    labels: list[Any]
    splits: list[str]


def read_table(
    uri: str, content: bytes, image_column: str | None, label_column: str | None, *, needs_label: bool = True
) -> LabelTable:
    """Reads a table of labels; a table that needs none may lack the column. Raises UserError."""
    suffix = suffix_of(uri.partition("?")[0])
    if suffix not in TABLE_SUFFIXES:
        raise UserError(f"{uri} is no table of labels; --labels names a .csv, .tsv or .jsonl file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{uri} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    rows = json_rows(uri, text) if suffix in (".jsonl", ".ndjson") else csv_rows(uri, text)
    names: list[str] = []  # of the columns of paths, labels and splits
    found = LabelTable([], [], [], [])
    every = list(rows)
    for line, row in every:
        if not names:
            paths = column(uri, list(row), image_column, PATH_NAMES, "--image-column", "paths")
            others = [name for name in row if name != paths]
            labels = label_column_of(uri, others, label_column, needs_label=needs_label)
            names = [paths, labels, split_column([values for _, values in every])]
        word = word_of(row.get(names[2])) if names[2] else ""
        if word and word not in SPLIT_OF:
            raise UserError(
                f"{uri} line {line} has the split {word!r}{nearest(word, SPLIT_OF)}; train, val, test are known"
            )
        if row.get(names[0]) in (None, ""):
            raise UserError(f"{uri} line {line} has no {names[0]}")
        label = row.get(names[1])
        label = label.strip() or None if isinstance(label, str) else label
        if type(label) not in (str, int, float, bool, type(None)):
            raise UserError(f"{uri} line {line} has the label {label!r}; a number, a text, true or false is read")
        if label is None and needs_label and SPLIT_OF.get(word, "train") == "train":
            raise UserError(f"{uri} line {line} has no {names[1]}")
        found.lines.append(line)
        found.paths.append(str(row[names[0]]).strip())
        found.labels.append(label)
        found.splits.append(SPLIT_OF.get(word, ""))
    if not found.paths:
        raise UserError(f"{uri} has no rows")
    return found


def label_column_of(uri: str, names: list[str], label_column: str | None, *, needs_label: bool) -> str:
    try:
        return column(uri, names, label_column, LABEL_NAMES, "--label-column", "labels")
    except UserError:
        if needs_label:
            raise
        return ""


def split_column(rows: list[dict[str, Any]]) -> str:
    """Returns the column of splits: the one named split, or one of a like name that holds words of splits."""
    for name in rows[0]:
        words = {word_of(row.get(name)) for row in rows} if name.lower() in SPLIT_NAMES else set()
        if name.lower() == "split" or words & SPLIT_OF.keys():
            return name
    return ""


def word_of(value: Any) -> str:
    return str(value or "").strip().lower()


def csv_rows(uri: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the line, values by column). Columns are separated by a comma, a semicolon or a tab."""
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(header) == 2 and suffix_of(header[0]) in PICTURES:  # no header, but the first row
            yield 1, {"path": header[0], "label": header[1]}
            header = ["path", "label"]
        if len(set(header)) < len(header):
            raise UserError(f"{uri} names a column twice: {', '.join(header)}")
        for row in reader:
            if not any(row):
                continue
            if len(row) != len(header):
                raise UserError(f"{uri} line {reader.line_num} has {len(row)} values for {len(header)} columns")
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{uri} line {reader.line_num} is no CSV: {error}") from error


def json_rows(uri: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{uri} line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{uri} line {number} is no JSON object such as {{'path': 'cat/1.jpg', 'label': 'cat'}}")
        yield number, row


def column(uri: str, names: list[str], wanted: str | None, usual: tuple[str, ...], option: str, what: str) -> str:
    """Returns the column of paths or labels. Raises UserError if none fits."""
    if wanted:
        if wanted not in names:
            raise UserError(f"{uri} has no column {wanted}{nearest(wanted, names)}; it has {', '.join(names)}")
        return wanted
    by_name = {name.lower(): name for name in reversed(names)}
    for name in usual:
        if name in by_name:
            return by_name[name]
    rest = [name for name in names if name.lower() not in (*SPLIT_NAMES, *PATH_NAMES, *ROW_NAMES)]
    if what == "labels" and len(rest) == 1:
        return rest[0]
    raise UserError(f"{uri} has the columns {', '.join(names)}; which holds the {what}? Name it with {option}")


def read_labels_file(labels: str, tree: Tree, files: Files) -> tuple[str, bytes, str]:
    """Returns (where the file is, its content, the folder in the tree that its paths are relative to)."""
    if labels in files.names:
        row = files.names.index(labels)
        content = tree.read(labels, int(files.sizes[row]), int(files.at[row]))
        return tree.where(labels), content, labels.rpartition("/")[0]
    folder, name = split_uri(labels)
    try:
        content = Folder(folder).read(name)
    except FileNotFoundError:
        raise UserError(f"--labels: there is no file {labels}, neither here nor below --path") from None
    root, inside = (
        f"{tree.where('').partition('?')[0].rstrip('/')}/",
        join_uri(Folder(folder).uri, name).partition("?")[0],
    )
    below = inside[len(root) :].rpartition("/")[0] if inside.startswith(root) else ""
    return join_uri(folder, name) if "://" in labels else labels, content, below


def labelled_source(
    tree: Tree,
    files: Files,
    tables: dict[str, str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Returns the source of the pictures that tables of labels name. Raises UserError.

    tables: the split of each table, '' where the table itself says it, or holds train alone."""
    pictures = pictures_of(tree, files)
    places: dict[str, list[int]] = {}  # of the pictures, by split
    values: dict[str, list[Any]] = {}
    uris, seen = [], dict[int, tuple[Any, str]]()
    for labels, split_of_table in tables.items():
        uri, content, below = read_labels_file(labels, tree, files)
        needs_label = split_of_table in ("", "train")
        table = read_table(uri, content, image_column, label_column, needs_label=needs_label)
        found = positions_of(uri, table, pictures, below, tree.where(""), seen)
        for at, label, split in zip(found, table.labels, table.splits, strict=True):
            name = split_of_table or split or "train"
            places.setdefault(name, []).append(at)
            values.setdefault(name, []).append(label)
        uris.append(uri)
    if "train" not in places:
        raise UserError(f"{uris[0]} names no row of train; its splits are {', '.join(places)}")
    splits = [split for split in SPLITS if split in places]
    where = listing(uris)
    numbers = numbered([Labels(split=split, where=where, values=values_of(values[split])) for split in splits])
    need_two_classes(where, numbers.class_names)
    stored: dict[str, pa.Table] = {}
    for split, labels_of_split in zip(splits, numbers.numbers, strict=True):
        if labels_of_split is not None:
            order = np.argsort(labels_of_split, kind="stable")
            chosen = [places[split][i] for i in order]
            stored[split] = table_of(files, pictures, chosen, labels_of_split[order])
    idle = [name for i, name in enumerate(pictures.names) if i not in seen]
    left_out = [out for out in pictures.left_out if tree.where(out.path) not in uris]
    return Source(
        name="folder",
        class_names=numbers.class_names,
        splits=stored,
        reader=FileReader(tree),
        layout=f"labels in {where}",
        notes=numbers.notes,
        left_out=[*left_out, *(LeftOut(path=name, kind=UNNAMED, reason=f"{where} does not name it") for name in idle)],
    )


def values_of(labels: list[Any]) -> Any:
    """Returns labels as an Arrow array: as texts if they differ in type. The texts 0 and 0.0 are one class."""
    if all(label is None or (isinstance(label, str) and re.fullmatch(r"-?[0-9]+(\.0+)?", label)) for label in labels):
        labels = [label and label.partition(".")[0] for label in labels]
    try:
        return pa.array(labels)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if label is None else str(label) for label in labels])


def positions_of(
    uri: str, table: LabelTable, pictures: Pictures, below: str, root: str, seen: dict[int, tuple[Any, str]]
) -> list[int]:
    """Returns each row's position among the pictures. Raises UserError for a path that names none, or one twice.

    A path is relative to the table's folder `below`, or to `root`, or begins with root or the name of its folder.
    seen: the label and the place of each picture that a table has named."""
    place = {name: i for i, name in enumerate(pictures.names)}
    root = root.replace("\\", "/").rstrip("/")
    own = f"{root.rpartition('/')[2]}/"
    stems: dict[str, int] = {}
    for name, i in place.items():
        stem = name[: len(name) - len(suffix_of(name))]
        stems[stem] = i if stem not in stems else SEVERAL
    found: list[int] = []
    for line, path, label in zip(table.lines, table.paths, table.labels, strict=True):
        name = path.replace("\\", "/").removeprefix("./")
        tried = [f"{below}/{name}" if below else name, name, name.removeprefix(f"{root}/"), name.removeprefix(own)]
        at = next((known[n] for known in (place, stems) for n in tried if n in known), None)
        if at is None:
            raise UserError(f"{uri} line {line} names {path}, and no such picture is below --path; correct the table")
        if at == SEVERAL:
            raise UserError(f"{uri} line {line} names {path}, and several pictures have this name; add the suffix")
        if at in seen:
            other, before = seen[at]
            fault = f"again, as {before} does" if other == label else f"as {label!r}, and {before} as {other!r}"
            raise UserError(f"{uri} line {line} names {path} {fault}; name each picture once")
        seen[at] = label, f"line {line} of {uri}"
        found.append(at)
    return found
