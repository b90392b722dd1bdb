"""Finds pictures that look almost the same, by a 64-bit hash of their coarse pattern of brightness."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cifar_dist.data.duplicates import MOST_EXAMPLES, Pictures

COLUMNS, ROWS = 9, 8  # of the reduced picture that the hash compares
LEAST_SIDE = 256  # pixels a side that the hash reads at least of a large picture
# Hash bits in which near duplicates may differ, and the changes between neighbouring bits that a hash must have. Plain
# pictures, such as one bright thing in the middle, have few changes, and different things have the same hash. On the
# 60,000 pictures of CIFAR-10 saved as JPEG, these values give 220 pairs. In the 48 pairs whose gray pixels correlate
# least, one pair shows two things. The values leave out 1,413 pictures. Without LEAST_CHANGES, of 286 pairs 52 have
# a correlation below 0.8, and pairs of two things are among them.
DISTANCE, LEAST_CHANGES = 4, 28
BANDS = DISTANCE + 1  # of bits: hashes that differ in at most DISTANCE bits agree in at least one band
MOST_COMPARED = 1000  # following pictures of a band's bucket that a picture is compared with


def perceptual_hash(pixels: np.ndarray) -> int:
    """Returns a 64-bit hash of uint8 pixels [H, W, 3] that changes in few bits if a picture is resized or re-encoded.

    The gray picture is averaged down to 9 x 8 cells. A bit tells whether a cell is brighter than its left neighbour:
    row by row from the top left, the first bit is the highest. Shifts, crops and mirroring change many bits. From 512
    pixels a side on, only every n-th row or column counts, so that the hash stays fast.
    """
    height, width = pixels.shape[:2]
    part = pixels[:: max(1, height // LEAST_SIDE), :: max(1, width // LEAST_SIDE)]
    gray = Image.fromarray(np.ascontiguousarray(part)).convert("L")
    cells = np.asarray(gray.resize((COLUMNS, ROWS), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


@dataclass(kw_only=True)
class NearDuplicates:
    """Near duplicates of S splits with N pictures.

    num_pairs: int [S, S], pairs by the splits of both pictures, the earlier split first. has: bool [N, S], whether a
    picture has a near duplicate in a split. examples[earlier, later]: up to MOST_EXAMPLES (distance, row, row), the
    nearest first. num_compared, num_plain, num_bounded: pictures compared, too plain to compare, and compared with only
    MOST_COMPARED others of their bucket.
    """

    num_pairs: np.ndarray
    has: np.ndarray
    examples: dict[tuple[int, int], list[tuple[int, int, int]]]
    num_compared: int
    num_plain: int
    num_bounded: int


def near_duplicates(pictures: Pictures, hashes: np.ndarray, is_hashed: np.ndarray) -> NearDuplicates:
    """Finds pairs of pictures with other pixels and hashes that differ by at most DISTANCE bits.

    hashes: uint64 [N]; is_hashed: bool [N], False where no hash was computed. Copies in a split count once.
    """
    num_splits = len(pictures.splits)
    is_plain = is_hashed & (num_changes(hashes) < LEAST_CHANGES)
    rows = np.flatnonzero(is_hashed & ~is_plain & pictures.first_copies())
    found = NearDuplicates(
        num_pairs=np.zeros((num_splits, num_splits), int),
        has=np.zeros((len(hashes), num_splits), bool),
        examples={},
        num_compared=int((is_hashed & ~is_plain).sum()),
        num_plain=int(is_plain.sum()),
        num_bounded=0,
    )
    for band in range(BANDS):
        keys = band_of(hashes[rows], band)
        order = rows[np.lexsort((rows, hashes[rows], keys))]
        sizes = np.unique(keys, return_counts=True)[1]
        found.num_bounded = max(found.num_bounded, int(sizes[sizes > MOST_COMPARED + 1].sum()))
        for a, b in close_pairs(hashes, order, band):
            differ = (pictures.group[a] != pictures.group[b]) | (pictures.group[a] < 0)
            note(found, pictures, hashes, a[differ], b[differ])
    return found


def num_changes(hashes: np.ndarray) -> np.ndarray:
    """Returns for each hash, 8 x 8 bits, how many of the 112 pairs of neighbouring bits differ."""
    beside = (hashes ^ hashes >> np.uint64(1)) & np.uint64(0x7F7F7F7F7F7F7F7F)
    below = (hashes ^ hashes >> np.uint64(8)) & np.uint64(0x00FFFFFFFFFFFFFF)
    return np.bitwise_count(beside) + np.bitwise_count(below)


def band_of(hashes: np.ndarray, band: int) -> np.ndarray:
    """Returns the band's bits of each hash. Band 0 has the lowest bits."""
    low, high = 64 * band // BANDS, 64 * (band + 1) // BANDS
    return hashes >> np.uint64(low) & np.uint64((1 << high - low) - 1)


def close_pairs(hashes: np.ndarray, order: np.ndarray, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs of rows (first rows, second rows) that agree in the band and differ by at most DISTANCE bits.

    order: rows sorted by the band. Pairs that agree in a lower band too are left out: that band has yielded them.
    """
    sorted_hashes = hashes[order]
    keys = band_of(sorted_hashes, band)
    first = np.arange(len(order))
    for offset in range(1, MOST_COMPARED + 1):
        first = first[first < len(order) - offset]
        first = first[keys[first] == keys[first + offset]]
        if not len(first):
            return
        differing = sorted_hashes[first] ^ sorted_hashes[first + offset]
        is_close = np.bitwise_count(differing) <= DISTANCE
        for lower in range(band):
            is_close &= band_of(differing, lower) != 0
        a, b = order[first[is_close]], order[first[is_close] + offset]
        yield np.minimum(a, b), np.maximum(a, b)


def note(found: NearDuplicates, pictures: Pictures, hashes: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Adds pairs of rows a < b to what was found."""
    num_splits = len(pictures.splits)
    between = pictures.split[a] * num_splits + pictures.split[b]
    found.num_pairs += np.bincount(between, minlength=num_splits**2).reshape(num_splits, num_splits)
    found.has[a, pictures.split[b]] = True
    found.has[b, pictures.split[a]] = True
    distance = np.bitwise_count(hashes[a] ^ hashes[b])
    for key in np.unique(between).tolist():
        examples = found.examples.setdefault(divmod(key, num_splits), [])
        may_enter = between == key
        if len(examples) == MOST_EXAMPLES:
            worst, last, _ = examples[-1]
            may_enter &= (distance < worst) | ((distance == worst) & (a <= last))
        i = np.flatnonzero(may_enter)
        nearest = i[np.lexsort((b[i], a[i], distance[i]))[:MOST_EXAMPLES]]
        examples += [(int(distance[j]), int(a[j]), int(b[j])) for j in nearest]
        examples[:] = sorted(examples)[:MOST_EXAMPLES]
