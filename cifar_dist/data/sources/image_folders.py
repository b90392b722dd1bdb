"""Folders of images: PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE."""

import os
from functools import partial
from pathlib import Path

from cifar_dist.data.sources.picture import Item
from cifar_dist.data.sources.source import DATA_SUFFIXES, Source, draw_test_split, need_two_classes
from cifar_dist.errors import UserError


def image_folder(path: str | None, test_fraction: float = 0.2, seed: int = 0) -> Source:
    """Reads train/CLASS/* and test/CLASS/*. Labels follow the sorted class folders. Draws a missing test split."""
    root = Path(os.path.expanduser(path or ""))
    if not path or not (root / "train").is_dir():
        raise UserError(
            f"{path or '(no --path)'} holds no folder named train; --source folder reads PATH/train/CLASS/IMAGE and, "
            "if it is there, PATH/test/CLASS/IMAGE"
        )
    refuse_unread(root)
    class_names = [p.name for p in visible(root / "train") if p.is_dir()]
    need_two_classes(str(root / "train"), class_names)
    train = split_items(root, "train", class_names)
    if (root / "test").is_dir():
        splits = {"train": train, "test": split_items(root, "test", class_names)}
    else:
        splits = draw_test_split(train, class_names, test_fraction, seed)
    return Source(name="folder", class_names=class_names, splits=splits)


def refuse_unread(root: Path) -> None:
    """Raises UserError for a folder or a data file that would not be read."""
    for folder, read in ((root, {"train", "test"}), (root / "train", set()), (root / "test", set())):
        for entry in visible(folder) if folder.is_dir() else []:
            if entry.name not in read and (entry.suffix.lower() in DATA_SUFFIXES or (read and entry.is_dir())):
                raise UserError(
                    f"{entry} would not be read: --source folder reads PATH/train/CLASS/IMAGE and "
                    "PATH/test/CLASS/IMAGE; move it away, or name a folder of links to "
                    "train and to what is the test split"
                )


def split_items(root: Path, split: str, class_names: list[str]) -> list[Item]:
    """Returns the images of a split, class by class. Raises UserError for a class that is empty or has folders."""
    found = {p.name for p in visible(root / split) if p.is_dir()}
    if extra := sorted(found - set(class_names)):
        raise UserError(f"class {extra[0]!r} is in {root / split} but not in {root / 'train'}")
    items = []
    for label, name in enumerate(class_names):
        files = visible(root / split / name) if name in found else []
        if not files:
            raise UserError(f"class {name!r} has no images in {root / split}; add some or remove the class")
        if inner := next((p for p in files if p.is_dir()), None):
            num_files = sum(p.is_file() for p in inner.rglob("*"))
            raise UserError(
                f"{inner} is a folder inside a class's folder, and its {num_files} files would not be read; move "
                f"its images up into {inner.parent}, or move it away"
            )
        items += [Item(f"{split}/{name}/{p.name}", label, partial(read_file, p), str(p)) for p in files]
    return items


def visible(folder: Path) -> list[Path]:
    """Returns the folder's entries sorted by name, without hidden entries."""
    found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    for path in found:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{str(path)!r} has a name that is not UTF-8; rename it") from None
    return found


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
