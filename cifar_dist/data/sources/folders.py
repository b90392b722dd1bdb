"""Pictures in folders: SPLIT/CLASS/... or CLASS/..., read at any depth below a class folder."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cifar_dist.data.sources.names import NOTE, STRAY, LeftOut, kind_of, listing, split_of_folder
from cifar_dist.data.sources.source import FileReader, Source, items_table, need_two_classes
from cifar_dist.data.sources.trees import Files, Tree
from cifar_dist.errors import UserError

LAYOUTS = "SPLIT/CLASS/IMAGE or CLASS/IMAGE, where SPLIT is train, val or test"
STARTS = (  # of the files that Pillow knows
    *(b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\xff\x4f\xff\x51"),
    *(b"\0\0\0\x0cjP  ", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
)


class Pictures(NamedTuple):
    """The pictures of a tree (names, and their rows in the tree's Files), its empty folders, and what is left out."""

    names: list[str]
    rows: list[int]
    empty: list[str]
    left_out: list[LeftOut]


def pictures_of(tree: Tree, files: Files) -> Pictures:
    """Tells pictures from other files: by their names, or by their first bytes where a name does not say."""
    found = Pictures([], [], [], [])
    for row, name in enumerate(files.names):
        kind = kind_of(name)
        if name.endswith("/"):
            if kind_of(name + "x.png") == "":
                found.empty.append(name)
            continue
        if kind is None:
            size, at = int(files.sizes[row]), int(files.at[row])
            kind = "" if size > 0 and starts_as_picture(tree, name, size, at) else NOTE
        if kind:
            found.left_out.append(LeftOut(path=name, kind=kind, reason=kind))
        else:
            found.names.append(name)
            found.rows.append(row)
    found.empty.extend(without_pictures(found))
    return found


def without_pictures(found: Pictures) -> list[str]:
    """Returns folders FOLDER/ that hold other files and no picture: a class whose pictures are missing.

    Folders of notes at the top are no classes."""
    full = {folder for name in found.names for folder in folders_above(name)}
    others: set[str] = set()
    for out in found.left_out:
        folder = out.path.rpartition("/")[0]
        is_data = folder and kind_of(f"{folder}/x.png") == "" and (out.kind == STRAY or "/" in folder)
        others |= {f"{folder}/"} if is_data and folder not in full else set()
    return sorted(others)


def folders_above(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def starts_as_picture(tree: Tree, name: str, size: int, at: int) -> bool:
    start = tree.start(name, size, at)
    is_riff, is_avif = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[4:12] in (b"ftypavif", b"ftypavis")
    return start.startswith(STARTS) or is_riff or is_avif


def folder_source(tree: Tree, files: Files, where: str) -> Source:
    """Returns the source of pictures in class folders. Raises UserError for a layout that is not understood."""
    found = pictures_of(tree, files)
    if not found.names:
        raise UserError(f"{where} holds no pictures; --source folder reads {LAYOUTS}")
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
            "folder of training pictures train, or give a class another name"
        )
    names = sorted(below)
    refuse_inner_splits(where, found.names, names)
    order, labels = by_class(found.names, names, where)
    splits = {"train": table_of(files, found, order.tolist(), labels)}
    return source_of(tree, found, names, splits, layout=f"folders CLASS/{depth(found.names, 1)}", where=where)


def no_class(where: str, name: str) -> str:
    return (
        f"{where}/{name} lies in no class folder, so it has no label and would not be read; move it into one, or away, "
        "or name a table of labels with --labels"
    )


def split_folders(tree: Tree, files: Files, found: Pictures, below: dict[str, list[int]], where: str) -> Source:
    """Returns the source of SPLIT/CLASS/... `below`: positions of the pictures by their first folder."""
    folders = folders_of_splits(below, where)
    inner = {split: inner_names(found, below[top], top) for split, top in folders.items()}
    class_names = classes_of(inner["train"].values(), [n for n in found.empty if n.startswith(f"{folders['train']}/")])
    notes, splits = [], {}
    for split, top in folders.items():
        names = inner[split]
        known = set(classes_of(names.values(), []))
        if split != "train" and not known & set(class_names):
            notes += without_labels(found, names, split, top)
            continue
        if extra := sorted(known - set(class_names)):
            raise UserError(f"class {extra[0]!r} is in {where}/{top} but not in {where}/{folders['train']}")
        if loose := [name for name in names.values() if "/" not in name]:
            raise UserError(no_class(f"{where}/{top}", loose[0]))
        order, labels = by_class(list(names.values()), class_names, f"{where}/{top}", split)
        positions = list(names)
        splits[split] = table_of(files, found, [positions[i] for i in order], labels)
    shown = [f"{folders[split]}/CLASS/{depth(inner[split].values(), 1)}" for split in splits]
    return source_of(tree, found, class_names, splits, layout=f"folders {', '.join(shown)}", where=where, notes=notes)


def folders_of_splits(below: dict[str, list[int]], where: str) -> dict[str, str]:
    """Returns the folder of each split, train first. Raises UserError for other folders with pictures."""
    folders: dict[str, str] = {}
    for top, positions in sorted(below.items()):
        split = split_of_folder(top)
        if split is None:
            if positions:
                raise UserError(
                    f"{where}/{top} would not be read, with its {len(positions)} pictures: beside train, --source "
                    "folder reads val and test; move it away, or rename it (a class named train needs another name)"
                )
        elif split in folders:
            raise UserError(f"{where} holds two folders for {split}: {folders[split]} and {top}; join them")
        else:
            folders[split] = top
    return {split: folders[split] for split in ("train", "validation", "test") if split in folders}


def without_labels(found: Pictures, names: dict[int, str], split: str, top: str) -> list[str]:
    """Leaves a split's pictures out, none of which lies in a folder of a class. Returns the note to tell."""
    if not names:
        return [f"{top}/ holds no pictures"]
    note = (
        f"{top}/ is left out: its {len(names):,} pictures lie in no folder of a class of train, so they have no labels"
    )
    found.left_out.extend(
        LeftOut(path=found.names[i], kind="pictures without a label", reason=note, split=split) for i in names
    )
    return [note]


def inner_names(found: Pictures, positions: list[int], top: str) -> dict[int, str]:
    """Returns the names below the folder `top` by position, and without a folder train/train that only repeats it."""
    names = {i: found.names[i][len(top) + 1 :] for i in positions}
    firsts = {name.partition("/")[0] for name in names.values()}
    if len(firsts) == 1 and (first := firsts.pop()).lower() == top.lower() and all("/" in n for n in names.values()):
        return {i: name[len(first) + 1 :] for i, name in names.items()}
    return names


def classes_of(names: Iterable[str], empty: list[str]) -> list[str]:
    """Returns the sorted class folders: the first folders of the names, and empty folders SPLIT/CLASS/."""
    found = {name.partition("/")[0] for name in names if "/" in name}
    return sorted(found | {name.split("/")[1] for name in empty if name.count("/") > 1})


def by_class(
    names: Collection[str], class_names: list[str], where: str, split: str = "train"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (stored order of the names CLASS/..., class by class, and their labels), int64 [n] each."""
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number[name.partition("/")[0]] for name in names], np.int64)
    counts = np.bincount(labels, minlength=len(class_names))
    if split == "train" and not counts.all():
        name = class_names[int(np.argmin(counts))]
        raise UserError(f"class {name!r} has no images in {where}; add some or remove the folder")
    order = np.argsort(labels, kind="stable")
    return order, labels[order]


def table_of(files: Files, found: Pictures, positions: list[int], labels: np.ndarray) -> pa.Table:
    rows = np.array(found.rows, np.int64)[positions]
    numbers = {"num_bytes": files.sizes[rows], "at": files.at[rows], "changed": files.changed[rows]}
    return items_table([found.names[i] for i in positions], labels, **numbers)


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


def unwrapped(tree: Tree, files: Files) -> tuple[Tree, Files, str, list[LeftOut]]:
    """Returns tree, files and prefix below folders that hold a single folder and no picture: 'data/' of an archive.

    Returns the files outside the prefix too, which are left out."""
    prefix, outside = "", list[LeftOut]()
    while True:
        names = [name for name in files.names if kind_of(f"{name}x.png" if name.endswith("/") else name) == ""]
        tops = {name.partition("/")[0] for name in names}
        if len(tops) != 1 or any(name.count("/") < 2 for name in names) or split_of_folder(top := tops.pop()):
            return tree, files, prefix, outside
        for name in files.names:
            if not name.startswith(f"{top}/"):
                kind = kind_of(name) or NOTE
                outside.append(LeftOut(path=f"{prefix}{name}", kind=kind, reason=kind))
        tree, files, prefix = tree.below(f"{top}/"), files.below(f"{top}/"), f"{prefix}{top}/"
