"""Finds pictures whose pixels a data set holds more than once, by a checksum of the pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

MOST_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The N pictures of all splits, one split after the other.

    split, label: int [N]. group: int [N], equal for equal pixels, numbered by first appearance, -1 without a checksum.
    """

    splits: list[str]
    class_names: list[str]
    paths: pa.ChunkedArray
    split: np.ndarray
    label: np.ndarray
    group: np.ndarray

    @staticmethod
    def of(splits: dict[str, pa.Table], class_names: list[str]) -> "Pictures":
        """Returns the pictures of tables with FACTS' columns."""
        facts = pa.concat_tables(list(splits.values()))
        encoded = facts["pixels_sha256"].combine_chunks().dictionary_encode()
        return Pictures(
            splits=list(splits),
            class_names=class_names,
            paths=facts["path"],
            split=np.repeat(np.arange(len(splits)), [len(table) for table in splits.values()]),
            label=facts["label"].to_numpy(),
            group=encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64),
        )

    def first_copies(self) -> np.ndarray:
        """Returns bool [N]: False for pictures whose pixels an earlier picture of the same split has."""
        known = np.flatnonzero(self.group >= 0)
        places = self.group[known] * len(self.splits) + self.split[known]
        is_first = np.ones(len(self.group), bool)
        is_first[known] = False
        is_first[known[np.unique(places, return_index=True)[1]]] = True
        return is_first

    def example(self, *rows: int) -> list[dict[str, str]]:
        """Returns path, split and class name of pictures."""
        return [
            {
                "path": self.paths[int(row)].as_py(),
                "split": self.splits[self.split[row]],
                "class": self.class_names[self.label[row]],
            }
            for row in rows
        ]


def duplicates(pictures: Pictures) -> dict[str, Any]:
    """Returns the card's part about pictures with equal pixels, in the order of their first appearance.

    num_pictures: those that share their pixels with another one. within[split]: groups of equal pictures, and the
    pictures in them. across: for each split, how many of its pictures an earlier split has too. contradictory: groups
    of equal pictures with several labels. Examples are pairs of pictures.
    """
    sizes = np.bincount(pictures.group[pictures.group >= 0])
    known = np.flatnonzero(pictures.group >= 0)
    repeated = known[sizes[pictures.group[known]] > 1]
    repeated = repeated[np.argsort(pictures.group[repeated], kind="stable")]
    parts = [repeated[pictures.split[repeated] == s] for s in range(len(pictures.splits))]
    names = pictures.splits
    return {
        "num_compared": len(known),
        "num_pictures": len(repeated),
        "within": {name: within(pictures, part) for name, part in zip(names, parts, strict=True)},
        "across": [
            {"split": names[late], "other": names[early], **across(pictures, parts[early], parts[late], late)}
            for late in range(len(names))
            for early in range(late)
        ],
        "contradictory": contradictory(pictures, repeated),
    }


def within(pictures: Pictures, rows: np.ndarray) -> dict[str, Any]:
    """Describes the copies among a split's repeated rows, which are sorted by group."""
    _, first, counts = np.unique(pictures.group[rows], return_index=True, return_counts=True)
    first, counts = first[counts > 1], counts[counts > 1]
    examples = [pictures.example(rows[i], rows[i + 1]) for i in first[:MOST_EXAMPLES]]
    return {"num_groups": len(counts), "num_pictures": int(counts.sum()), "examples": examples}


def across(pictures: Pictures, early: np.ndarray, late: np.ndarray, split: int) -> dict[str, Any]:
    """Describes the pictures of the later split that the earlier split has too. Both rows are sorted by group."""
    _, first_early = np.unique(pictures.group[early], return_index=True)
    _, first_late, counts = np.unique(pictures.group[late], return_index=True, return_counts=True)
    early, late = early[first_early], late[first_late]
    _, at_early, at_late = np.intersect1d(pictures.group[early], pictures.group[late], return_indices=True)
    num_pictures = int(counts[at_late].sum())
    pairs = list(zip(late[at_late], early[at_early], strict=True))[:MOST_EXAMPLES]
    return {
        "num_groups": len(at_late),
        "num_pictures": num_pictures,
        "share": num_pictures / int((pictures.split == split).sum()),
        "examples": [pictures.example(*pair) for pair in pairs],
    }


def contradictory(pictures: Pictures, rows: np.ndarray) -> dict[str, Any]:
    """Describes the groups of equal pictures with several labels. The rows are sorted by group."""
    _, first, inverse, counts = np.unique(
        pictures.group[rows], return_index=True, return_inverse=True, return_counts=True
    )
    other = np.flatnonzero(pictures.label[rows] != pictures.label[rows[first]][inverse])
    groups, first_other = np.unique(inverse[other], return_index=True)
    pairs = list(zip(rows[first[groups]], rows[other[first_other]], strict=True))[:MOST_EXAMPLES]
    return {
        "num_groups": len(groups),
        "num_pictures": int(counts[groups].sum()),
        "examples": [pictures.example(*pair) for pair in pairs],
    }
