"""Labels of any type become class numbers."""

import re
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


def texts_of(labels: Labels, *, are_signs: bool = False) -> tuple[np.ndarray, list[str]]:
    """Returns (codes int64 [n], the texts that they number); UNLABELLED where a row has no label. Raises UserError.

    are_signs: -1 is a class, beside 1."""
    values = decoded(labels)
    kind = values.type
    names = labels.names
    if pa.types.is_boolean(kind):
        values, names = values.cast(pa.int8()), ["false", "true"]
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        encoded = values.cast(pa.string()).dictionary_encode()
        codes = encoded.indices.fill_null(UNLABELLED).to_numpy(zero_copy_only=False).astype(np.int64)
        return without_empty(codes, encoded.dictionary.to_pylist())
    values = whole_numbers(labels.where, values)
    none = values.is_null().to_numpy(zero_copy_only=False)
    numbers = values.fill_null(UNLABELLED).to_numpy(zero_copy_only=False)
    if names is None:
        none = none if are_signs else numbers == UNLABELLED
        found = np.unique(numbers[~none])
        codes = np.where(none, UNLABELLED, np.searchsorted(found, numbers))
        return codes.astype(np.int64), [str(number) for number in found]
    wrong = (numbers < UNLABELLED) | (numbers >= len(names))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"{labels.where} row {row} has the label {numbers[row]}; 0 to {len(names) - 1} are valid")
    return numbers, names


def decoded(labels: Labels) -> Any:
    """Returns the labels as one Arrow array without a dictionary."""
    values = labels.values.combine_chunks() if isinstance(labels.values, pa.ChunkedArray) else labels.values
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def signs(files: list[Labels]) -> bool:
    """Whether the labels of train are -1 and 1, a usual coding of two classes."""
    found: set[Any] = set()
    for labels in files:
        if labels.split == "train":
            if labels.names or not (pa.types.is_integer(kind := decoded(labels).type) or pa.types.is_floating(kind)):
                return False
            found |= set(decoded(labels).unique().to_pylist())
            if len(found) > 2:
                return False
    return found == {-1, 1}


def without_empty(codes: np.ndarray, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Takes an empty text for no label."""
    if "" in texts:
        codes = np.where(codes == texts.index(""), UNLABELLED, codes)
    return codes, texts


def whole_numbers(where: str, values: Any) -> Any:
    """Returns numbers as int64. Raises UserError if one is none: it may be no class."""
    kind = values.type
    if pa.types.is_floating(kind):
        values = values.cast(pa.float64())
        odd = pc.or_(pc.not_equal(pc.floor(values), values), pc.greater_equal(pc.abs(values), 2.0**63))
    elif kind == pa.uint64():
        odd = pc.greater_equal(values, pa.scalar(1 << 63, pa.uint64()))
    elif pa.types.is_integer(kind):
        return values.cast(pa.int64())
    else:
        raise UserError(f"{where} has labels of the type {kind}; numbers, texts or booleans are read")
    odd = pc.fill_null(odd, False)
    if pc.any(odd).as_py():
        row = pc.index(odd, True).as_py()
        raise UserError(
            f"{where} row {row} has the label {values[row].as_py()}; a class needs a whole number below 2^63 or a text"
        )
    return values.cast(pa.int64())


def in_order(texts: set[str]) -> list[str]:
    """Returns class names in order: by number if all are numbers, else by text."""
    numeric = all(re.fullmatch("-?[0-9]{1,1000}", text) for text in texts)
    return sorted(texts, key=lambda text: (int(text), text)) if numeric else sorted(texts)


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Class names, and the class numbers of each file's rows: int64 [n], None for a file of an unlabelled split."""

    class_names: list[str]
    numbers: list[np.ndarray | None]
    notes: list[str]


Coded = list[tuple[np.ndarray, list[str]]]


def unlabelled_splits(files: list[Labels], coded: Coded) -> set[str]:
    """Returns the splits, without train, whose rows all lack a label."""
    return {
        split
        for split in {labels.split for labels in files} - {"train"}
        if all(
            (codes == UNLABELLED).all() or texts == [str(UNLABELLED)]
            for labels, (codes, texts) in zip(files, coded, strict=True)
            if labels.split == split and len(codes)
        )
    }


def file_with(class_name: str, files: list[Labels], coded: Coded) -> str:
    """Returns the first file that has pictures of a class."""
    return next(
        labels.where
        for labels, (codes, texts) in zip(files, coded, strict=True)
        if class_name in texts and (codes == texts.index(class_name)).any()
    )


def numbered(files: list[Labels]) -> Numbered:
    """Numbers the classes of all files. The names of the first file of train lead, others are matched by name.

    Raises UserError for a row of train without a label, and for a label of another split that train does not have."""
    are_signs = signs(files)
    coded = [texts_of(labels, are_signs=are_signs) for labels in files]
    notes: list[str] = []
    unlabelled = unlabelled_splits(files, coded)
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
    if extra := in_order(used["other"] - used["train"]):
        raise UserError(
            f"{file_with(extra[0], files, coded)} has pictures of class {extra[0]!r}, and train has none; add some to "
            "train, or remove them there"
        )
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
