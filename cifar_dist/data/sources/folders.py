"""Pictures in folders: SPLIT/CLASS/... or CLASS/..., read at any depth below a class folder."""

import unicodedata
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cifar_dist.data.manifest import SPLITS
from cifar_dist.data.sources.labels import in_order
from cifar_dist.data.sources.names import NO_CLASS, UNLABELLED, LeftOut, listing, split_of_folder, splits_in, suffix_of
from cifar_dist.data.sources.pictures import Pictures, pictures_of, table_of
from cifar_dist.data.sources.source import FileReader, Source, need_two_classes
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.errors import UserError

LAYOUTS = "SPLIT/CLASS/IMAGE or CLASS/IMAGE, where SPLIT is train, val or test"
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz"}


class Split(NamedTuple):
    """The folder of a split, with '/', and its pictures: their names below it by their position among all pictures."""

    folder: str
    names: dict[int, str]


def folder_source(tree: Tree, files: Files, where: str) -> Source:
    """Returns the source of pictures in class folders. Raises UserError for a layout that is not understood."""
    found = pictures_of(tree, files)
    if not found.names:
        raise UserError(no_pictures(found, where))
    below: dict[str, list[int]] = {}  # positions of pictures by their first folder
    for i, name in enumerate(found.names):
        top, mark, _ = name.partition("/")
        if not mark:
            raise UserError(no_class(where, name))
        below.setdefault(top, []).append(i)
    for name in found.empty:
        below.setdefault(name.partition("/")[0], [])
    tops = {top: split_of_folder(top) for top in below}
    if "train" in tops.values():
        return split_folders(tree, files, found, below, where)
    if others := [top for top, split in tops.items() if split and below[top]]:
        raise UserError(
            f"{where} holds a folder {others[0]} and none named train; --source folder reads {LAYOUTS}; name the "
            f"folder of training pictures train, or give {others[0]} another name if it is a class or holds all"
        )
    names = classes_of(f"{top}/" for top in below)
    refuse_inner_splits(where, found.names, names)
    order, labels = by_class(found.names, names, where)
    splits = {"train": table_of(files, found, order.tolist(), labels)}
    return source_of(tree, found, names, splits, layout=f"folders CLASS/{depth(found.names, 1)}", where=where)


def no_pictures(found: Pictures, where: str) -> str:
    if archives := [out.path for out in found.left_out if suffix_of(out.path) in ARCHIVES]:
        return f"{where} holds no pictures, but archives: {listing(archives)}; unpack them, or name one with --path"
    return f"{where} holds no pictures; --source folder reads {LAYOUTS}"


def no_class(where: str, name: str) -> str:
    return (
        f"{where}/{name} lies in no class folder, so it has no label and would not be read; move it into one, or away, "
        "or name a table of labels with --labels"
    )


def split_folders(tree: Tree, files: Files, found: Pictures, below: dict[str, list[int]], where: str) -> Source:
    """Returns the source of SPLIT/CLASS/... `below`: positions of the pictures by their first folder."""
    class_names: list[str] = []
    notes, splits, shown = list[str](), dict[str, pa.Table](), list[str]()
    for split, top in folders_of_splits(below, where).items():
        folder, names = inner = inner_names(found, below[top], top, class_names)
        if split == "train":
            train, empty = folder, [name[len(folder) :] for name in found.empty if name.startswith(folder)]
            class_names = classes_of([*names.values(), *empty])
        known = classes_of(names.values())
        if extra := [name for name in known if same(name) not in {same(known) for known in class_names}]:
            if len(extra) == len(known) and has_no_labels(extra, top):
                notes += without_labels(found, inner, split)
                continue
            raise UserError(
                f"{named(extra)} in {where}/{folder[:-1]} but not in {where}/{train[:-1]}, whose classes are "
                f"{listing(class_names)}; rename the folder, or move it away"
            )
        if split != "train" and not known:
            notes += without_labels(found, inner, split)
            continue
        if loose := [name for name in names.values() if "/" not in name]:
            raise UserError(no_class(f"{where}/{folder[:-1]}", loose[0]))
        order, labels = by_class(list(names.values()), class_names, f"{where}/{folder[:-1]}", split)
        positions = list(names)
        splits[split] = table_of(files, found, [positions[i] for i in order], labels)
        shown.append(f"{folder}CLASS/{depth(names.values(), 1)}")
    return source_of(tree, found, class_names, splits, layout=f"folders {', '.join(shown)}", where=where, notes=notes)


def named(folders: list[str]) -> str:
    many = f"classes {listing(folders)} are"
    return f"class {folders[0]!r} is" if len(folders) == 1 else many


def has_no_labels(folders: list[str], top: str) -> bool:
    """Whether the single folder of a split holds its unlabelled pictures: its name is that of no class."""
    (first, *more) = folders
    return not more and (first.lower() in NO_CLASS or first.lower() == top.lower() or bool(splits_in(first)))


def folders_of_splits(below: dict[str, list[int]], where: str) -> dict[str, str]:
    """Returns the folder of each split, train first. Raises UserError for other folders with pictures."""
    folders: dict[str, str] = {}
    trains = [top for top in sorted(below) if split_of_folder(top) == "train"]
    for top, positions in sorted(below.items()):
        split = split_of_folder(top)
        if split is None:
            if positions:
                raise UserError(
                    f"{where}/{top} would not be read, with its {len(positions)} pictures: beside {trains[0]}, "
                    f"--source folder reads folders for val and test; move it away, or rename it (if {trains[0]} is a "
                    "class, it needs another name)"
                )
        elif split in folders:
            both = f"{folders[split]} and {top}"
            raise UserError(f"{where} holds two folders for {split}: {both}; join them, or rename one")
        else:
            folders[split] = top
    return {split: folders[split] for split in SPLITS if split in folders}


def without_labels(found: Pictures, inner: Split, split: str) -> list[str]:
    """Leaves a split's pictures out, none of which lies in a folder of a class. Returns the note to tell."""
    folder, names = inner
    if not names:
        return [f"{folder} holds no pictures"]
    count = f"its {len(names):,} pictures"
    note = f"{folder} is left out: {count} lie in no folder of a class of train, so they have no labels"
    found.left_out.extend(
        LeftOut(path=found.names[i], kind="pictures without a label", reason=note, split=split) for i in names
    )
    return [note]


def inner_names(found: Pictures, positions: list[int], top: str, class_names: list[str]) -> Split:
    """Returns a split's pictures below its folder, or below the one folder around all its classes: train/images.

    class_names: of train, none before they are known."""
    folder, known = f"{top}/", {same(name) for name in class_names}
    while True:
        names = {i: found.names[i][len(folder) :] for i in positions}
        every = [*names.values(), *(name[len(folder) :] for name in found.empty if name.startswith(folder))]
        firsts = {name.partition("/")[0] if "/" in name else "" for name in every if name}
        inner = {name.split("/")[1] if name.count("/") > 1 else "" for name in every if name}
        first = firsts.pop() if len(firsts) == 1 else ""
        is_around = len(inner) > 1 or bool({*map(same, inner)} & known) or same(first.lower()) == same(top.lower())
        if not first or "" in inner or not is_around or first.lower() in UNLABELLED or same(first) in known:
            return Split(folder, names)
        folder += f"{first}/"


def same(name: str) -> str:
    """Returns a name as it is compared: accents are letters of their own on some systems."""
    return unicodedata.normalize("NFC", name)


def classes_of(names: Iterable[str]) -> list[str]:
    """Returns the class folders of the names CLASS/..., in order. Raises UserError for two that look the same."""
    found = {name.partition("/")[0] for name in names if "/" in name}
    spelled: dict[str, str] = {}
    for name in sorted(found):
        if spelled.setdefault(same(name), name) != name:
            raise UserError(f"two folders of classes look the same, {name!r}: their accents differ in code; join them")
    return in_order(found)


def by_class(
    names: Collection[str], class_names: list[str], where: str, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (stored order of the names CLASS/..., class by class, and their labels), int64 [n] each."""
    number = {same(name): label for label, name in enumerate(class_names)}
    labels = np.array([number[same(name.partition("/")[0])] for name in names], np.int64)
    counts = np.bincount(labels, minlength=len(class_names))
    if split == "train" and not counts.all():
        name = class_names[int(np.argmin(counts))]
        raise UserError(f"class {name!r} has no images in {where}; add some or remove the folder")
    order = np.argsort(labels, kind="stable")
    return order, labels[order]


def source_of(
    tree: Tree,
    found: Pictures,
    class_names: list[str],
    splits: dict[str, pa.Table],
    *,
    layout: str,
    where: str,
    notes: list[str] | None = None,
) -> Source:
    need_two_classes(where, class_names)
    return Source(
        name="folder",
        class_names=class_names,
        splits=splits,
        reader=FileReader(tree),
        layout=layout,
        notes=notes or [],
        left_out=found.left_out,
    )


def depth(names: Iterable[str], num_folders: int) -> str:
    """Returns '**' if some names have more folders than that, else '*'."""
    return "**" if any(name.count("/") > num_folders for name in names) else "*"


def refuse_inner_splits(where: str, names: list[str], class_names: list[str]) -> None:
    """Raises UserError for CLASS/train/... and CLASS/test/..., which would be read as one split."""
    inner: dict[str, set[str]] = {name: set() for name in class_names}
    for name in names:
        first, _, rest = name.partition("/")
        second, mark, _ = rest.partition("/")
        inner[first].add(split_of_folder(second) or "" if mark else "")
    if all("train" in found and "" not in found for found in inner.values()):
        raise UserError(
            f"the folders in {where} ({listing(class_names)}) hold folders named train, as in CLASS/train/IMAGE; "
            "put the split above the class: train/CLASS/IMAGE"
        )
