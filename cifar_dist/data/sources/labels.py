"""Labels of any type become class numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifar_dist.data.sources.names import listing
from cifar_dist.errors import UserError

UNLABELLED = -1


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a file's rows. `values`: an Arrow array. `names`: class names if the values are their numbers.

    `where` names the file in messages."""

    split: str
    where: str
    values: Any
    names: list[str] | None = None


def texts_of(labels: Labels) -> tuple[np.ndarray, list[str]]:
    """Returns (codes int64 [n], the texts that they number); UNLABELLED where a row has no label. Raises UserError."""
    values = labels.values.combine_chunks() if isinstance(labels.values, pa.ChunkedArray) else labels.values
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_boolean(kind):
        values = values.cast(pa.int8())
        names: list[str] | None = ["false", "true"]
    elif pa.types.is_floating(kind):
        values = whole_numbers(labels.where, values)
        names = labels.names
    elif pa.types.is_integer(kind):
        names = labels.names
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        encoded = values.cast(pa.string()).dictionary_encode()
        codes = encoded.indices.fill_null(UNLABELLED).to_numpy(zero_copy_only=False).astype(np.int64)
        return without_empty(codes, encoded.dictionary.to_pylist())
    else:
        raise UserError(f"{labels.where} has labels of the type {kind}; numbers, texts or booleans are read")
    numbers = values.cast(pa.int64(), safe=False).fill_null(UNLABELLED).to_numpy(zero_copy_only=False)
    if names is None:
        found = np.unique(numbers[numbers != UNLABELLED])
        codes = np.where(numbers == UNLABELLED, UNLABELLED, np.searchsorted(found, numbers))
        return codes.astype(np.int64), [str(number) for number in found]
    wrong = (numbers < UNLABELLED) | (numbers >= len(names))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"{labels.where} row {row} has the label {numbers[row]}; 0 to {len(names) - 1} are valid")
    return numbers, names


def without_empty(codes: np.ndarray, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Takes an empty text for no label."""
    if "" in texts:
        codes = np.where(codes == texts.index(""), UNLABELLED, codes)
    return codes, texts


def whole_numbers(where: str, values: Any) -> Any:
    """Returns floating-point numbers as integers. Raises UserError if one is none: it may be no class."""
    odd = pc.fill_null(pc.not_equal(pc.floor(values), values), False)
    if pc.any(odd).as_py():
        row = pc.index(odd, True).as_py()
        raise UserError(
            f"{where} row {row} has the label {values[row].as_py()}; a class needs a whole number or a text"
        )
    return values.cast(pa.int64(), safe=False)


def in_order(texts: set[str]) -> list[str]:
    """Returns class names in order: by number if all are numbers, else by text."""
    numeric = all(text.lstrip("-").isdecimal() and text.isascii() for text in texts)
    return sorted(texts, key=lambda text: (int(text), text)) if numeric else sorted(texts)


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Class names, and the class numbers of each file's rows: int64 [n], None for a file of an unlabelled split."""

    class_names: list[str]
    numbers: list[np.ndarray | None]
    notes: list[str]


def numbered(where: str, files: list[Labels]) -> Numbered:
    """Numbers the classes of all files. The names of the first file of train lead, others are matched by name.

    Raises UserError for a row of train without a label, and for a label of another split that train does not have."""
    coded = [texts_of(labels) for labels in files]
    notes: list[str] = []
    unlabelled = {
        split
        for split in {labels.split for labels in files} - {"train"}
        if all(
            (codes == UNLABELLED).all()
            for labels, (codes, _) in zip(files, coded, strict=True)
            if labels.split == split
        )
    }
    used: dict[str, set[str]] = {"train": set(), "other": set()}
    for labels, (codes, texts) in zip(files, coded, strict=True):
        if labels.split in unlabelled:
            continue
        if (codes == UNLABELLED).any():
            row = int(np.argmax(codes == UNLABELLED))
            raise UserError(
                f"{labels.where} row {row} has the label {labels.values[row].as_py()}, which names no class"
            )
        used["train" if labels.split == "train" else "other"] |= {texts[code] for code in np.unique(codes)}
    if extra := sorted(used["other"] - used["train"]):
        raise UserError(f"{where}: class {extra[0]!r} is in another split but not in train")
    leading = next((labels.names for labels in files if labels.split == "train" and labels.names), None)
    class_names = [name for name in leading if name in used["train"]] if leading else in_order(used["train"])
    class_names += in_order(used["train"] - set(class_names))
    if leading and (idle := [name for name in leading if name not in used["train"]]):
        notes.append(f"{len(idle)} of the {len(leading)} class names have no pictures and are dropped: {listing(idle)}")
    number = {name: label for label, name in enumerate(class_names)}
    numbers = [
        None
        if labels.split in unlabelled
        else np.array([number.get(text, UNLABELLED) for text in texts] or [0], np.int64)[codes]
        for labels, (codes, texts) in zip(files, coded, strict=True)
    ]
    for split in sorted(unlabelled):
        rows = sum(len(labels.values) for labels in files if labels.split == split)
        notes.append(f"{split} is left out: its {rows:,} rows have no labels")
    return Numbered(class_names=class_names, numbers=numbers, notes=notes)
