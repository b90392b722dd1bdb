"""A data set to be stored: class names, items per split, and the checked rows made from the items."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cifar_dist.data.check import Checker, Picture
from cifar_dist.data.order import TEST, stratified_split
from cifar_dist.data.sources.picture import DeepImages, Item, Row, encode_png, examined
from cifar_dist.errors import UserError

# Suffixes of data files. The job stops if it would not read such a file; other files, such as notes, it ignores.
DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".npy", ".npz", ".h5", ".pkl", ".tfrecord"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"),
}


@dataclass(kw_only=True)
class Source:
    """A data set to be stored: class names in label order and, per split, the items."""

    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]
    skipped: list[str] = field(default_factory=list)
    deep: DeepImages = field(default_factory=DeepImages)
    checker: Checker = field(default_factory=Checker)

    def rows(self, split: str, skip_bad: bool = False) -> Iterator[Row]:
        """Yields the split's checked rows. A bad image raises UserError, or with `skip_bad` is noted in `skipped`."""
        for picture, sound in self.checker.checked(self._pictures(split, skip_bad)):
            row = picture.owner
            if not sound and picture.pixels is not None:
                row = replace(row, encoded=encode_png(picture.pixels), encoding="PNG")
            yield row

    def _pictures(self, split: str, skip_bad: bool) -> Iterator[Picture[Row]]:
        for item in self.splits[split]:
            try:
                yield examined(item, self.deep)
            except UserError as error:
                if not skip_bad:
                    raise UserError(f"{error}; mend or remove it, or leave such files out with --skip-bad") from error
                self.skipped.append(str(error))

    def forget(self) -> None:
        """Clears the findings of an earlier reading."""
        self.skipped.clear()
        self.deep = DeepImages()


def draw_test_split(items: list[Item], class_names: list[str], fraction: float, seed: int) -> dict[str, list[Item]]:
    """Returns train and test splits, drawn from `items` by a seeded, stratified permutation. Raises UserError."""
    labels = np.array([item.label for item in items])
    for label, name in enumerate(class_names):
        if (labels == label).sum() < 2:
            raise UserError(f"class {name!r} has fewer than 2 images, so no test split can be drawn from train")
    train, test = stratified_split(labels, fraction, (TEST, seed))
    return {"train": [items[i] for i in train], "test": [items[i] for i in test]}


def need_two_classes(where: str, class_names: list[str]) -> None:
    if len(class_names) < 2:
        raise UserError(f"{where} holds {len(class_names)} classes; a classifier needs 2 or more")
