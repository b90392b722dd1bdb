"""Which files of a tree are pictures, and which folders are empty or lie around all."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cifar_dist.data.sources.formats import CONVERT, unread_kind
from cifar_dist.data.sources.names import NOTE, SPLIT_OF, UNKNOWN, LeftOut, kind_of, split_of_folder
from cifar_dist.data.sources.source import items_table
from cifar_dist.data.sources.trees import GONE, Files, Tree
from cifar_dist.errors import UserError

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
            refuse_gone(tree, name, size)
            if size > 0 and starts_as_picture(tree, name, size, at):
                kind = ""
            else:
                kind = UNKNOWN if "/" in name else NOTE
        if kind:
            found.left_out.append(LeftOut(path=name, kind=kind, reason=kind))
        else:
            found.names.append(name)
            found.rows.append(row)
    found.empty.extend(without_pictures(found))
    return found


def refuse_gone(tree: Tree, name: str, size: int) -> None:
    """Raises UserError for a name without a suffix that cannot be read: it may be a link to a folder of a class."""
    if size == GONE:
        raise UserError(
            f"{tree.where(name)} is a broken link or no regular file, and may stand for a folder of pictures; mend or "
            "remove it"
        )


def without_pictures(found: Pictures) -> list[str]:
    """Returns folders FOLDER/ that hold other files and no picture: a class whose pictures are missing.

    Folders of notes at the top are no classes."""
    full = {folder for name in found.names for folder in folders_above(name)}
    others: set[str] = set()
    for out in found.left_out:
        folder = out.path.rpartition("/")[0]
        is_data = folder and kind_of(f"{folder}/x.png") == "" and (out.kind != NOTE or "/" in folder)
        others |= {f"{folder}/"} if is_data and folder not in full else set()
    return sorted(others)


def folders_above(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def starts_as_picture(tree: Tree, name: str, size: int, at: int) -> bool:
    """Whether a file's content is that of a picture, read or not."""
    start = tree.start(name, size, at)
    is_riff, is_avif = start[:4] == b"RIFF" and start[8:12] == b"WEBP", start[4:12] in (b"ftypavif", b"ftypavis")
    unread = unread_kind(start, "")
    return start.startswith(STARTS) or is_riff or is_avif or (unread is not None and unread[1] == CONVERT)


def table_of(files: Files, found: Pictures, positions: list[int], labels: np.ndarray) -> pa.Table:
    rows = np.array(found.rows, np.int64)[positions]
    numbers = {"num_bytes": files.sizes[rows], "at": files.at[rows], "changed": files.changed[rows]}
    return items_table([found.names[i] for i in positions], labels, **numbers)


def unwrapped(tree: Tree, files: Files) -> tuple[Tree, Files, str, list[LeftOut]]:
    """Returns tree, files and prefix below folders that hold a single folder and no picture: 'data/' of an archive.

    Returns the files outside the prefix too, which are left out."""
    prefix, outside = "", list[LeftOut]()
    while top := single_folder(files):
        if any(name.count("/") < 2 for name in pictures_in(files)) or is_split(top, files):
            break
        outside += outside_of(tree, files, top, prefix)
        tree, files, prefix = tree.below(f"{top}/"), files.below(f"{top}/"), f"{prefix}{top}/"
    return tree, files, prefix, outside


def is_split(top: str, files: Files) -> bool:
    """Whether the one folder around all is a split's. 'my test data' with folders of splits in it is a data set's."""
    inner = {name.split("/")[1] for name in pictures_in(files) if name.count("/") > 1}
    return top.lower() in SPLIT_OF or (split_of_folder(top) is not None and not any(map(split_of_folder, inner)))


def pictures_in(files: Files) -> list[str]:
    """Returns the names of pictures, and of empty folders, by their names alone."""
    return [name for name in files.names if kind_of(f"{name}x.png" if name.endswith("/") else name) == ""]


def single_folder(files: Files) -> str | None:
    """Returns the folder that holds all pictures, and all files that may be some, if a single one does."""
    unknown = [name for name in files.names if "/" in name and kind_of(name) is None and not name.endswith("/")]
    tops = {name.partition("/")[0] if "/" in name else "" for name in [*pictures_in(files), *unknown]}
    return tops.pop() or None if len(tops) == 1 else None


def outside_of(tree: Tree, files: Files, top: str, prefix: str) -> list[LeftOut]:
    """Returns the files that do not lie in the folder `top`: no pictures, so they are left out. Raises UserError."""
    left_out = []
    for name, size in zip(files.names, files.sizes.tolist(), strict=True):
        if not name.startswith(f"{top}/"):
            kind = kind_of(name)
            if kind is None:
                refuse_gone(tree, name, size)
            left_out.append(LeftOut(path=f"{prefix}{name}", kind=kind or NOTE, reason=kind or NOTE))
    return left_out
