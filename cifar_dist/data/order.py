"""Decides which rank gets which images and how they are augmented: pure functions of (seed, epoch, step, rank, world).

All draws come from one counter-based generator, the SplitMix64 finalizer (Steele, Lea, Flood: "Fast splittable
pseudorandom number generators", 2014) over the key. So they do not depend on state, threads or the NumPy version.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

ORDER, FLIPS, VALIDATION, SUBSET, TEST, STEP, CROP, CUTOUT = range(8)  # purposes of draws: a stream each
LEAST_PER_RANK = 2  # images in a step: BatchNorm over a single image has no variance
STEPS_PER_DRAW = 32  # steps per draw of augmentations: a draw for a single step costs hardly less
CHUNK = 1 << 16  # keys per draw, to limit the size of temporary arrays


def draws(counter: np.ndarray | int, *key: int) -> np.ndarray:
    """Returns uniform uint64 draws, one per element of `counter` (integers of any shape), for the stream `key`."""
    with np.errstate(over="ignore"):
        state: Any = np.uint64(0)
        for word in (*key, np.asarray(counter)):
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the epoch's permutation of range(n), int64 [n]."""
    keys = np.empty(n, np.uint64)
    for start in range(0, n, CHUNK):
        keys[start : start + CHUNK] = draws(np.arange(start, min(start + CHUNK, n)), ORDER, seed, epoch)
    return np.argsort(keys)  # no ties: the generator maps counters one to one


def flips(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Returns bool [len(ids), 2]: flip horizontally, flip vertically; each with probability 1/2, independently."""
    bits = draws(ids, FLIPS, seed, epoch)
    return np.stack([bits & np.uint64(1), bits >> np.uint64(1) & np.uint64(1)], axis=-1).astype(bool)


def positions(seed: int, epoch: int, ids: np.ndarray, stream: int, num_positions: int) -> np.ndarray:
    """Returns int32 [len(ids), 2]: (y, x), uniform in range(num_positions). `stream`: CROP or CUTOUT."""
    high = np.stack([draws(ids, stream, seed, epoch, axis) >> np.uint64(32) for axis in (0, 1)], axis=-1)
    return (high * np.uint64(num_positions) >> np.uint64(32)).astype(np.int32)


class Augment(NamedTuple):
    """The augmentation of n images. flips: bool [n, 2], horizontal and vertical.

    crop, hole: int32 [n, 2], the (y, x) of the upper left corner of the crop and of the cut-out square in the image."""

    flips: np.ndarray
    crop: np.ndarray
    hole: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """The model's input: float32 [n, 3, image_size, image_size] in `input_range`, in memory as NHWC or NCHW.

    `resize` and `antialias` define how every image becomes square: squash resizes both sides; fit resizes the whole
    image, keeps its aspect ratio and centres it on `fill`; crop resizes the shorter side and takes the centre.
    An image of that size stays unchanged.
    `flips`, `crop_padding` and `cutout_size` define the augmentation of training images, by default none.
    """

    image_size: int
    resize: str = "squash"
    antialias: bool = False
    input_range: str = "0..1"
    channels_last: bool = False
    flips: str = "none"
    crop_padding: int = 0
    cutout_size: int = 0

    @property
    def mean_and_std(self) -> tuple[float, float]:
        """Of the normalization, on the 0 to 255 scale of decoded pixels."""
        return {"0..1": (0.0, 255.0), "-1..1": (127.5, 127.5), "0..255": (0.0, 1.0)}[self.input_range]

    @property
    def fill(self) -> float:
        """The normalized grey outside an image and where a square is cut out: about CIFAR-10's mean."""
        mean, std = self.mean_and_std
        return (127 - mean) / std

    def draw(self, seed: int, epoch: int, ids: np.ndarray) -> Augment:
        """Draws augmentations: a pure function of (seed, epoch, id). A hole's centre may be anywhere in the image."""
        allowed = {"none": (False, False), "horizontal": (True, False), "both": (True, True)}[self.flips]
        _, crop, hole = no_augment(len(ids), self.image_size)
        if self.crop_padding:
            crop = positions(seed, epoch, ids, CROP, 2 * self.crop_padding + 1) - np.int32(self.crop_padding)
        if self.cutout_size:
            hole = positions(seed, epoch, ids, CUTOUT, self.image_size) - np.int32(self.cutout_size // 2)
        return Augment(flips(seed, epoch, ids) & np.array(allowed), crop, hole)


def no_augment(num_images: int, image_size: int) -> Augment:
    """Returns an Augment that changes nothing: no flip, no shift, the hole outside the image."""
    shape = (num_images, 2)
    return Augment(np.zeros(shape, bool), np.zeros(shape, np.int32), np.full(shape, image_size, np.int32))


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """Returns the seed of torch's generator (for dropout) in one step of one rank. It depends only on the cursor."""
    return int(draws(rank, STEP, seed, epoch, step) >> np.uint64(1))


def num_steps(n: int, global_batch_size: int) -> int:
    """Returns the steps per epoch. The last step may be smaller."""
    return -(-n // global_batch_size)


class RankPart(NamedTuple):
    """One rank's contiguous positions in a global step of `size` images. Not `counts`: another rank counts them."""

    start: int
    stop: int
    size: int
    counts: bool


def rank_part(step: int, n: int, global_batch_size: int, rank: int, world: int) -> RankPart:
    """Returns this rank's part of global step `step`. Parts differ by at most one image.

    No part is a single image unless the step is: BatchNorm has no variance of a single value, and every gradient
    behind it is 0. In a small last step fewer ranks have parts that count. The other ranks repeat these parts.
    """
    start = step * global_batch_size
    size = min(global_batch_size, n - start)
    num_parts = num_rank_parts(size, world)
    part = rank % num_parts
    first, last = part * size // num_parts, (part + 1) * size // num_parts
    return RankPart(start + first, start + last, size, rank < num_parts)


def num_rank_parts(size: int, world: int) -> int:
    """Returns how many ranks have images that count in a step of `size` images."""
    return max(1, min(world, size // LEAST_PER_RANK))


def num_micro_batches(num_images: int, accumulation_steps: int) -> int:
    """Returns into how many parts a rank splits its images of a step: a small last step into fewer."""
    return min(accumulation_steps, max(1, num_images // LEAST_PER_RANK))


def fewest_per_micro_batch(global_batch_size: int, world: int, accumulation_steps: int) -> int:
    """Returns the smallest number of images in a micro-batch of any rank, in a full step."""
    part = global_batch_size // world
    return part // max(1, min(accumulation_steps, part))


def stratified_split(labels: np.ndarray, fraction: float, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (rest, drawn): sorted int64 positions. Draws about `fraction` of each class.

    Each class of two or more images has at least one image on both sides.
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
    """Returns (train ids, validation ids): rows of the train split, the same for every rank, run and world size.

    labels: int64 [n]. train_images > 0 keeps only that many train ids, drawn evenly by class. It does not affect the
    validation ids.
    """
    train, validation = stratified_split(labels, validation_fraction, (VALIDATION, seed))
    return drawn_evenly(train, labels, train_images, seed), validation


def drawn_evenly(ids: np.ndarray, labels: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """Returns `num_images` of the ids, drawn evenly by class and sorted; all ids for 0 or if there are not more.

    ids: int64, rows of `labels`, int64 [n]."""
    if not 0 < num_images < len(ids):
        return ids
    keys = draws(ids, SUBSET, seed)
    by_class = np.lexsort((keys, labels[ids]))
    first = np.searchsorted(labels[ids][by_class], labels[ids][by_class])
    rank_in_class = np.arange(len(ids)) - first
    chosen = np.lexsort((keys[by_class], rank_in_class))[:num_images]
    return np.sort(ids[by_class][chosen])


class BatchPlan(NamedTuple):
    """A batch before it is read: row ids, augmentation, the number of ids that count, and the global batch size."""

    ids: np.ndarray
    augment: Augment | None
    num_counted: int
    global_size: int


def train_plans(
    ids: np.ndarray,
    spec: ImageSpec,
    *,
    seed: int,
    epoch: int,
    first_step: int,
    global_batch_size: int,
    rank: int,
    world: int,
) -> Iterator[BatchPlan]:
    """Yields this rank's part of each step of an epoch, from `first_step` on."""
    shuffled = ids[epoch_order(seed, epoch, len(ids))]
    last = num_steps(len(ids), global_batch_size)
    for first in range(first_step, last, STEPS_PER_DRAW):
        steps = range(first, min(first + STEPS_PER_DRAW, last))
        rank_parts = [rank_part(step, len(ids), global_batch_size, rank, world) for step in steps]
        parts = [shuffled[p.start : p.stop] for p in rank_parts]
        drawn = spec.draw(seed, epoch, np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        augments = map(Augment, *(np.split(values, ends) for values in drawn))
        for p, part, augment in zip(rank_parts, parts, augments, strict=True):
            yield BatchPlan(part, augment, len(part) if p.counts else 0, p.size)


def eval_plans(ids: np.ndarray, batch_size: int, rank: int, world: int) -> Iterator[BatchPlan]:
    """Yields each id exactly once over all ranks: each rank takes a contiguous run of a fixed sequence of batches.

    The batches do not depend on the world size, so floating-point results do not either.
    """
    num_batches = num_steps(len(ids), batch_size)
    for b in range(rank * num_batches // world, (rank + 1) * num_batches // world):
        part = ids[b * batch_size : (b + 1) * batch_size]
        yield BatchPlan(part, None, len(part), len(part))
