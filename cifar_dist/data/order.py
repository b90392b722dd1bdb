"""Which sample goes where, flipped how: pure functions of (seed, epoch, step, rank, world).

All draws come from one counter-based generator, the SplitMix64 finalizer (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", 2014) over the key, so they depend on no state, no thread and no NumPy version.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ORDER, FLIPS, VALIDATION, SUBSET, TEST, STEP, CROP, CUTOUT = range(8)  # what a draw is for: one stream each
LEAST_PER_RANK = 2  # images of a step: BatchNorm over a single one has no variance
STEPS_PER_DRAW = 32  # of augmentation: to draw for one step costs hardly less
CHUNK = 1 << 16  # keys drawn at a time, which take a handful of temporary arrays


def draws(counter: np.ndarray | int, *key: int) -> np.ndarray:
    """Uniform uint64 draws, one per element of `counter` (any shape of integers), for the stream `key`."""
    with np.errstate(over="ignore"):
        state: Any = np.uint64(0)
        for word in (*key, np.asarray(counter)):
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of range(n) for this epoch (int64)."""
    keys = np.empty(n, np.uint64)
    for start in range(0, n, CHUNK):
        keys[start : start + CHUNK] = draws(np.arange(start, min(start + CHUNK, n)), ORDER, seed, epoch)
    return np.argsort(keys)  # no two are equal: the generator maps the counters one to one


def flips(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Bool [len(ids), 2]: flip horizontally, flip vertically; each with probability 1/2, independent."""
    bits = draws(ids, FLIPS, seed, epoch)
    return np.stack([bits & np.uint64(1), bits >> np.uint64(1) & np.uint64(1)], axis=-1).astype(bool)


def positions(seed: int, epoch: int, ids: np.ndarray, stream: int, num_positions: int) -> np.ndarray:
    """int32 [len(ids), 2]: (y, x), uniform in range(num_positions); `stream` is CROP or CUTOUT."""
    high = np.stack([draws(ids, stream, seed, epoch, axis) >> np.uint64(32) for axis in (0, 1)], axis=-1)
    return (high * np.uint64(num_positions) >> np.uint64(32)).astype(np.int32)


class Augment(NamedTuple):
    """What happens to each of n images. flips: bool [n, 2], horizontal and vertical. crop, hole: int32 [n, 2], (y, x)
    of the crop's and of the cut-out square's upper left corner in the image."""

    flips: np.ndarray
    crop: np.ndarray
    hole: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for training images of `image_size` pixels; by default nothing."""

    image_size: int
    flips: str = "none"
    crop_padding: int = 0
    cutout_size: int = 0

    def draw(self, seed: int, epoch: int, ids: np.ndarray) -> Augment:
        """A pure function of (seed, epoch, id). A hole's centre is anywhere in the image."""
        allowed = {"none": (False, False), "horizontal": (True, False), "both": (True, True)}[self.flips]
        _, crop, hole = no_augment(len(ids), self.image_size)
        if self.crop_padding:
            crop = positions(seed, epoch, ids, CROP, 2 * self.crop_padding + 1) - np.int32(self.crop_padding)
        if self.cutout_size:
            hole = positions(seed, epoch, ids, CUTOUT, self.image_size) - np.int32(self.cutout_size // 2)
        return Augment(flips(seed, epoch, ids) & np.array(allowed), crop, hole)


def no_augment(num_images: int, image_size: int) -> Augment:
    """The images as they are: no flip, no shift, the hole outside."""
    shape = (num_images, 2)
    return Augment(np.zeros(shape, bool), np.zeros(shape, np.int32), np.full(shape, image_size, np.int32))


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Seed of torch's generator for one step of one rank (dropout): it belongs to the cursor."""
    return int(draws(rank, STEP, seed, epoch, step) >> np.uint64(1))


def num_steps(n: int, global_batch_size: int) -> int:
    """Steps per epoch; the last one may be smaller."""
    return -(-n // global_batch_size)


class RankPart(NamedTuple):
    """One rank's contiguous positions of a global step of `size` images; where they do not `count`, another rank's."""

    start: int
    stop: int
    size: int
    counts: bool


def rank_part(step: int, n: int, global_batch_size: int, rank: int, world: int) -> RankPart:
    """This rank's part of global step `step`. Parts differ by at most one image.

    No part is a single image if the step has more than one: BatchNorm has no variance of a single value, and every
    gradient behind it is 0. In a small last step fewer ranks have parts that count, and the others work on the same.
    """
    start = step * global_batch_size
    size = min(global_batch_size, n - start)
    num_parts = num_rank_parts(size, world)
    part = rank % num_parts
    first, last = part * size // num_parts, (part + 1) * size // num_parts
    return RankPart(start + first, start + last, size, rank < num_parts)


def num_rank_parts(size: int, world: int) -> int:
    """How many ranks have images that count in a step of `size` images."""
    return max(1, min(world, size // LEAST_PER_RANK))


def fewest_per_micro_batch(global_batch_size: int, world: int, accumulation_steps: int) -> int:
    """The fewest images that a rank works on at a time in a whole step."""
    part = global_batch_size // world
    return part // max(1, min(accumulation_steps, part))


def stratified_split(labels: np.ndarray, fraction: float, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(rest, drawn): sorted int64 positions; of each class about `fraction` of its images are drawn.

    Every class of two or more images keeps at least one on either side.
    """
    is_drawn = np.zeros(len(labels), bool)
    for label in np.flatnonzero(np.bincount(labels)):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        is_drawn[members[np.argpartition(draws(members, *key), count)[:count]]] = True
    return np.flatnonzero(~is_drawn), np.flatnonzero(is_drawn)


def train_validation_ids(
    labels: np.ndarray, validation_fraction: float, train_images: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train ids, validation ids): rows of the train split, the same on every rank, run and world size.

    labels: int64 [n]. train_images > 0 keeps only that many train ids, evenly drawn by class; the validation
    ids stay the same.
    """
    train, validation = stratified_split(labels, validation_fraction, (VALIDATION, seed))
    if 0 < train_images < len(train):
        keys = draws(train, SUBSET, seed)
        by_class = np.lexsort((keys, labels[train]))
        first = np.searchsorted(labels[train][by_class], labels[train][by_class])
        rank_in_class = np.arange(len(train)) - first
        chosen = np.lexsort((keys[by_class], rank_in_class))[:train_images]
        train = np.sort(train[by_class][chosen])
    return train, validation


@dataclass(frozen=True)
class ImageSpec:
    """What the model wants: float32 [n, 3, image_size, image_size], in `input_range`, NHWC in memory or not.

    With `crop` images are shifted by the crop's corner; a `cutout_size` above 0 cuts a square of so many pixels out.
    """

    image_size: int
    input_range: str
    channels_last: bool
    crop: bool = False
    cutout_size: int = 0


class Plan(NamedTuple):
    """One batch before it is read: row ids, what happens to each image, how many of the ids count, and the global
    batch's size."""

    ids: np.ndarray
    augment: Augment | None
    num_counted: int
    global_size: int


def train_plans(
    ids: np.ndarray,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    first_step: int,
    global_batch_size: int,
    rank: int,
    world: int,
) -> Iterator[Plan]:
    """This rank's part of every step of an epoch from `first_step` on."""
    shuffled = ids[epoch_order(seed, epoch, len(ids))]
    last = num_steps(len(ids), global_batch_size)
    for first in range(first_step, last, STEPS_PER_DRAW):
        steps = range(first, min(first + STEPS_PER_DRAW, last))
        places = [rank_part(step, len(ids), global_batch_size, rank, world) for step in steps]
        parts = [shuffled[place.start : place.stop] for place in places]
        drawn = augmentation.draw(seed, epoch, np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        augments = map(Augment, *(np.split(values, ends) for values in drawn))
        for place, part, augment in zip(places, parts, augments, strict=True):
            yield Plan(part, augment, len(part) if place.counts else 0, place.size)


def eval_plans(ids: np.ndarray, batch_size: int, rank: int, world: int) -> Iterator[Plan]:
    """Every id exactly once over all ranks: a fixed grid of batches, of which a rank takes a contiguous run.

    The grid does not depend on the world size, so neither does any floating-point result.
    """
    num_batches = num_steps(len(ids), batch_size)
    for b in range(rank * num_batches // world, (rank + 1) * num_batches // world):
        part = ids[b * batch_size : (b + 1) * batch_size]
        yield Plan(part, None, len(part), len(part))
