"""The data card: what a data set is like. Class balance, sizes, formats, pictures held twice, pictures left out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cifar_dist.data.card_shape import SHAPE, check_shape
from cifar_dist.data.card_words import warnings
from cifar_dist.data.duplicates import MOST_EXAMPLES, Pictures, duplicates
from cifar_dist.data.manifest import SPLITS, Manifest
from cifar_dist.data.near_duplicates import DISTANCE, NearDuplicates, near_duplicates
from cifar_dist.errors import UserError, printable
from cifar_dist.sealed_json import from_json, is_sealed, seal, to_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

CARD = "data_card.json"
FORMAT_VERSION = 1
MOST_SIZES = 5  # of the most common sizes that the card lists

# The facts about a split: a row for each stored picture, in the order of the stored rows. path: in the source. height,
# width: pixels. num_bytes: of the stored file. encoding: of the source's file, such as JPEG. The checksum and the hash
# are null where they were not computed (check.pixels_sha256, near_duplicates.perceptual_hash).
FACTS = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_bytes", pa.int64()),
        ("encoding", pa.string()),
        ("pixels_sha256", pa.binary(32)),
        ("perceptual_hash", pa.uint64()),
        ("stored_as_png", pa.bool_()),
        ("has_alpha", pa.bool_()),
    ]
)


def data_card(
    *,
    source: str,
    manifest_sha256: str,
    class_names: list[str],
    splits: dict[str, pa.Table],
    left_out: list[dict[str, Any]],
    layout: str = "",
    drawn: Sequence[str] = (),
    made_of: str = "",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the card of a data set, which JSON can hold.

    splits: tables of FACTS, each with at least one row, for train, test and maybe validation. left_out: for each
    picture or file that was left out, a dict with `kind` (a few words, such as "unreadable"), `path` and, optionally,
    `reason` (a sentence). layout: how the source was read. drawn: the splits that were drawn from train. made_of: a
    checksum of all that the data set follows from. notes: further warnings. Raises
    ValueError for other splits and other columns.
    """
    splits = in_order(splits)
    for name, table in splits.items():
        if table.schema != FACTS:
            raise ValueError(f"the facts of {name} have another schema than FACTS")
    pictures = Pictures.of(splits, class_names)
    card = {
        "format_version": FORMAT_VERSION,
        "source": source,
        "layout": layout,
        "drawn": list(drawn),
        "manifest_sha256": manifest_sha256,
        "made_of": made_of,
        "class_names": class_names,
        "splits": {name: described(table, class_names) for name, table in splits.items()},
        "duplicates": duplicates(pictures),
        "near_duplicates": alike(pictures, pa.concat_tables(splits.values())["perceptual_hash"]),
        "left_out": counted(left_out),
    }
    return {**card, "warnings": [*warnings(card), *map(printable, notes)]}


def in_order(splits: dict[str, Any]) -> dict[str, Any]:
    """Returns the splits in SPLITS. Raises ValueError for a split of another name."""
    if others := set(splits) - set(SPLITS):
        raise ValueError(f"the splits {', '.join(sorted(others))} are none of {', '.join(SPLITS)}")
    return {name: splits[name] for name in SPLITS if name in splits}


def described(facts: pa.Table, class_names: list[str]) -> dict[str, Any]:
    """Returns the card's part about one split. Sizes are in pixels; an aspect ratio is width / height."""
    num_rows = np.bincount(facts["label"].to_numpy(), minlength=len(class_names))
    width, height = facts["width"].to_numpy(), facts["height"].to_numpy()
    sizes, counts = np.unique(np.stack([width, height], 1), axis=0, return_counts=True)
    common = np.argsort(-counts, kind="stable")[:MOST_SIZES]
    formats = Counter({v["values"]: v["counts"] for v in pc.value_counts(facts["encoding"]).to_pylist()})
    return {
        "num_rows": len(facts),
        "num_rows_per_class": num_rows.tolist(),
        "share_per_class": (num_rows / len(facts)).tolist(),
        "empty_classes": [name for name, count in zip(class_names, num_rows, strict=True) if not count],
        "imbalance": float(num_rows.max() / num_rows[num_rows > 0].min()),  # among the classes that have pictures
        "width": spread(width),
        "height": spread(height),
        "num_sizes": len(sizes),
        "common_sizes": [
            {"width": int(sizes[i, 0]), "height": int(sizes[i, 1]), "num_pictures": int(counts[i])} for i in common
        ],
        "aspect_ratio": spread(width / height),
        "num_bytes": pc.sum(facts["num_bytes"]).as_py(),
        "formats": dict(sorted(formats.items())),
        "num_stored_as_png": pc.sum(facts["stored_as_png"]).as_py(),
        "num_with_transparency": pc.sum(facts["has_alpha"]).as_py(),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


def alike(pictures: Pictures, hashes: pa.ChunkedArray) -> dict[str, Any] | None:
    """Returns the card's part about near duplicates, None if no picture has a hash.

    within and across are as in `duplicates`; num_pairs counts pairs of pictures. The other keys: see NearDuplicates.
    """
    if hashes.null_count == len(hashes):
        return None
    is_hashed = hashes.is_valid().to_numpy()
    found = near_duplicates(pictures, hashes.fill_null(0).to_numpy(), is_hashed)
    names = pictures.splits
    return {
        "distance": DISTANCE,
        "num_compared": found.num_compared,
        "num_plain": found.num_plain,
        "num_bounded": found.num_bounded,
        "within": {name: alike_in(pictures, found, s, s) for s, name in enumerate(names)},
        "across": [
            {"split": names[late], "other": names[early], **alike_in(pictures, found, early, late)}
            for late in range(len(names))
            for early in range(late)
        ],
    }


def alike_in(pictures: Pictures, found: NearDuplicates, early: int, late: int) -> dict[str, Any]:
    """Describes the pictures of the later split that have a near duplicate in the earlier split, or the same split."""
    in_late = pictures.split == late
    num_pictures = int(found.has[in_late, early].sum())
    examples = found.examples.get((early, late), [])
    return {
        "num_pairs": int(found.num_pairs[early, late]),
        "num_pictures": num_pictures,
        "share": num_pictures / int(in_late.sum()),
        "examples": [{"distance": distance, "pictures": pictures.example(b, a)} for distance, a, b in examples],
    }


def counted(left_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts what was left out by kind, the most frequent kind first, with the first examples of each kind."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for item in left_out:
        kinds.setdefault(item["kind"], []).append(item)
    return {
        "num_files": len(left_out),
        "kinds": [
            {
                "kind": kind,
                "num_files": len(items),
                "examples": [{"path": i["path"], "reason": i.get("reason", "")} for i in items[:MOST_EXAMPLES]],
            }
            for kind, items in sorted(kinds.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        ],
    }


def write_card(folder: Folder, card: dict[str, Any]) -> None:
    """Writes the card, sealed, into the data set's folder. Equal cards give equal bytes."""
    folder.write(CARD, to_json(seal(card)))


def read_card(uri: str, manifest: Manifest) -> dict[str, Any] | None:
    """Returns the data set's card as data_card made it, None if the data set has none.

    Raises UserError if the card is damaged, of another version or of another data set.
    """
    where = join_uri(uri, CARD)
    remedy = "remove it, or prepare the data set again"
    try:
        card = from_json(Folder(uri).read(CARD))
        version = card["format_version"]
        if version == FORMAT_VERSION:
            if not is_sealed(card):
                raise UserError(f"{where} does not match its own checksum; {remedy}")
            del card["sha256"]
            check_shape(card, SHAPE)
            card["splits"] = in_order(card["splits"])  # JSON has sorted them
            for part in filter(None, (card["duplicates"], card["near_duplicates"])):
                part["within"] = in_order(part["within"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} is damaged ({error!r}); {remedy}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}, this program reads {FORMAT_VERSION}; {remedy}")
    if card["manifest_sha256"] != manifest.sha256 or not is_of(card, manifest):
        raise UserError(f"{where} describes another data set than the manifest beside it; {remedy}")
    return card


def is_of(card: dict[str, Any], manifest: Manifest) -> bool:
    """Whether the card counts the rows that the manifest counts, and compares the splits that it counts."""
    counts = {name: split["num_rows_per_class"] for name, split in manifest.splits.items()}
    names = list(card["splits"])
    pairs = [(late, early) for i, late in enumerate(names) for early in names[:i]]
    compared = [part for part in (card["duplicates"], card["near_duplicates"]) if part]
    return (
        card["class_names"] == manifest.class_names
        and {name: split["num_rows_per_class"] for name, split in card["splits"].items()} == counts
        and all(list(part["within"]) == names for part in compared)
        and all([(e["split"], e["other"]) for e in part["across"]] == pairs for part in compared)
    )
