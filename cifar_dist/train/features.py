"""Computes the frozen base's features of each batch, or caches them on the node's disk by image and variant."""

import hashlib
import math
import os
import shutil
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cifar_dist.config import Config
from cifar_dist.data.batch import Batch, planned_batch
from cifar_dist.data.joined import AnyLoader
from cifar_dist.data.order import Augment, BatchPlan
from cifar_dist.data.private import keep_own, one_at_a_time
from cifar_dist.data.staged import DataSet
from cifar_dist.data.to_device import ToDevice
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import FrozenBase

LARGEST_SHARE = 3 / 4  # of the GPU's free memory that features may take
LOCK_SECONDS = 120.0  # to wait for another process that creates the files


class FeatureCache:
    """Features of a loader's images in one sparse file. The processes of a node share it, and later runs reuse it.

    Row id * num_variants + variant holds one image's features as NHWC; a variant is a flip. A second file holds each
    row's CRC-32, written after the row; 0 means that the row is missing. Rows with a wrong CRC are computed again.
    Raises UserError if `num_bytes`, the expected size of the rows, do not fit on the disk.
    """

    def __init__(
        self, path: Path, num_images: int, num_variants: int, base: FrozenBase, side: int, num_bytes: int
    ) -> None:
        self.path, self.num_variants, self.side, self.dtype = path, num_variants, side, base.dtype
        self.row_bytes = side * side * base.num_features * base.dtype.itemsize
        num_rows = num_images * num_variants
        try:
            keep_own(path, path.with_suffix(".crc32"))
            with one_at_a_time(path, LOCK_SECONDS, print, lambda: 0):
                for file, size in ((path, num_rows * self.row_bytes), (path.with_suffix(".crc32"), num_rows * 4)):
                    with open(file, "ab"):
                        os.truncate(file, size)
            free, written = shutil.disk_usage(path.parent).free, path.stat().st_blocks * 512
        except OSError as error:
            raise UserError(f"cannot keep features in {path}: {error}; set --staging-folder") from error
        if free < num_bytes - written:
            raise UserError(
                f"the cached features need {num_bytes / 2**30:.1f} GiB in {path.parent}, which has {free / 2**30:.1f} "
                "GiB free; set --staging-folder, or use --features computed"
            )
        self.notice = (
            f"cached features: {num_bytes / 2**30:.2f} GiB on disk in {path.parent} by the last epoch, at most "
            f"{num_rows * self.row_bytes / 2**30:.2f} GiB ({free / 2**30:.1f} GiB free); in memory "
            f"{self.row_bytes / 2**20:.2f} MiB for each image of three batches"
        )
        self.checks = np.memmap(path.with_suffix(".crc32"), np.uint32, "r+")
        self.file = os.open(path, os.O_RDWR)

    def rows(self, ids: np.ndarray, augment: Augment | None) -> np.ndarray:
        """Returns the row number of each image, given its flips."""
        return ids * self.num_variants + variants(augment)

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """Returns (features [n, C, side, side] on the CPU, bool [n]: which rows are stored and valid).

        The features of other rows are undefined."""
        content = np.empty((len(rows), self.row_bytes), np.uint8)
        is_stored = self.checks[rows] != 0
        for i in np.flatnonzero(is_stored):
            num_read = os.preadv(self.file, [content[i]], int(rows[i]) * self.row_bytes)
            is_stored[i] = num_read == self.row_bytes and check(content[i]) == self.checks[rows[i]]
        shape = len(rows), self.side, self.side, -1
        return torch.from_numpy(content).view(self.dtype).view(shape).permute(0, 3, 1, 2), is_stored

    def put(self, rows: np.ndarray, features: torch.Tensor) -> None:
        """Stores features [n, C, side, side]. Raises UserError if the disk is full."""
        images = features.permute(0, 2, 3, 1).contiguous().cpu().flatten(1).view(torch.uint8).numpy()
        try:
            for row, content in zip(rows, images, strict=True):
                written = os.pwrite(self.file, content, int(row) * self.row_bytes)
                if written < self.row_bytes:
                    raise OSError(28, "no space is left")  # the error that another write would raise
                self.checks[row] = check(content)
        except OSError as error:
            raise UserError(
                f"cannot keep features in {self.path}: {error}; make room, set --staging-folder, or use --features "
                "computed"
            ) from error


def check(content: np.ndarray) -> int:
    return zlib.crc32(content.data) or 1


def cache_key(base: FrozenBase, *settings: object) -> str:
    """Returns a hash of everything that features depend on: the base's weights and the input settings."""
    digest = hashlib.sha256(repr((base.dtype, *settings)).encode())
    for tensor in base.base.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def expected_bytes(
    num_train: int, num_validation: int, num_variants: int, epochs: int, image_size: int, *, itemsize: int = 4
) -> int:
    """Returns the expected bytes on disk after `epochs`.

    Of V equally likely variants, an image takes on average V * (1 - (1 - 1/V)^epochs) in that time."""
    seen = num_variants * (1 - (1 - 1 / num_variants) ** epochs)
    row_bytes = math.ceil(image_size / 32) ** 2 * FrozenBase.num_features * itemsize
    return round((num_train * seen + num_validation) * row_bytes)


NUM_VARIANTS = {"none": 1, "horizontal": 2, "both": 4}  # by --flips


def open_cache(
    config: Config, data_set: DataSet, base: FrozenBase, *, num_images: int, num_used: tuple[int, int]
) -> FeatureCache:
    """Opens this node's cache for `num_images`, by id. `num_used`: (train, validation) images that the run uses."""
    data = config.data
    num_variants = NUM_VARIANTS[data.flips]
    itemsize = base.dtype.itemsize
    num_bytes = expected_bytes(*num_used, num_variants, config.loop.epochs, data.image_size, itemsize=itemsize)
    key = cache_key(base, data.image_size, data.resize, data.antialias, data.input_range, num_variants)
    path = data_set.area / f"features-{key}.bin"
    side = math.ceil(data.image_size / 32)
    return FeatureCache(path, num_images, num_variants, base, side, num_bytes)


class DeviceFeatures:
    """The training input over a frozen base on a GPU: each image and flip goes through the base once per attempt.

    `batches` replaces the loader's; its `images` are features. The base always gets `num_at_once` images, some of them
    twice if need be: another size would be compiled anew, and would round otherwise.
    """

    def __init__(
        self,
        loader: AnyLoader,
        base: FrozenBase,
        train_ids: np.ndarray,
        validation_ids: np.ndarray,
        *,
        num_variants: int,
        num_at_once: int,
    ) -> None:
        self.loader, self.base, self.num_at_once = loader, base, num_at_once
        num_flipped = len(train_ids) * num_variants
        self.first_row = np.zeros(loader.num_images, np.int64)  # of each image: one for each flip, validation has none
        self.first_row[train_ids] = np.arange(0, num_flipped, num_variants)
        self.first_row[validation_ids] = np.arange(num_flipped, num_flipped + len(validation_ids))
        self._send = ToDevice(loader.device)
        shape = device_shape(loader, base, num_flipped + len(validation_ids))
        self.features = torch.empty(shape, dtype=base.dtype, device=loader.device)  # as NHWC
        self.is_stored = np.zeros(shape[0], bool)
        self.notice = f"cached features: {self.features.nbytes / 2**30:.2f} GiB of the GPU's memory"

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yields the planned batches. Only images without stored features are read."""
        for plan in plans:
            rows = self.first_row[plan.ids] + variants(plan.augment)
            missing = np.flatnonzero(~self.is_stored[rows])
            for first in range(0, len(missing), self.num_at_once):
                part = np.resize(missing[first : first + self.num_at_once], self.num_at_once)
                (batch,) = self.loader.batches([part_of(plan, part)])
                self.features[self._send(rows[part])] = self.base(batch.images).permute(0, 2, 3, 1)
            self.is_stored[rows] = True
            features = self.features[self._send(rows)].permute(0, 3, 1, 2)
            yield planned_batch(plan, features, self.loader.labels(plan.ids))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Returns features [n, C, side, side] in the base's dtype, on the device."""
        return batch.images


def device_shape(loader: AnyLoader, base: FrozenBase, num_rows: int) -> tuple[int, int, int, int]:
    side = math.ceil(loader.spec.image_size / 32)
    return num_rows, side, side, base.num_features


def fits_device(loader: AnyLoader, base: FrozenBase, num_rows: int) -> bool:
    """Whether so many rows of features fit into the loader's GPU beside the network. False without a GPU."""
    if loader.device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(loader.device)
    return math.prod(device_shape(loader, base, num_rows)) * base.dtype.itemsize <= free * LARGEST_SHARE


def variants(augment: Augment | None) -> np.ndarray | int:
    """Returns the number of each image's flip: int64 [n], or 0 without augmentation."""
    return 0 if augment is None else augment.flips @ np.array([1, 2])


def part_of(plan: BatchPlan, positions: np.ndarray) -> BatchPlan:
    """Returns the plan with only the images at `positions`."""
    augment = plan.augment and Augment(*(values[positions] for values in plan.augment))
    return plan._replace(ids=plan.ids[positions], augment=augment)


class Features:
    """The training input over a frozen base: `batches` replaces the loader's, a call computes a batch's features.

    With a cache, `batches` reads the stored features, and only images without stored features are decoded.
    """

    def __init__(self, loader: AnyLoader, base: FrozenBase, cache: FeatureCache | None = None) -> None:
        self.loader, self.base, self.cache = loader, base, cache

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yields the planned batches. With a cache, `images` holds only the images whose features are `missing`."""
        if self.cache is None:
            yield from self.loader.batches(plans)
            return
        taken: deque[tuple[BatchPlan, torch.Tensor, np.ndarray]] = deque()
        for batch in self.loader.batches(self._missing(plans, taken)):
            plan, features, missing = taken.popleft()
            labels = self.loader.labels(plan.ids)
            yield replace(batch, ids=plan.ids, labels=labels, augment=plan.augment, stored=features, missing=missing)

    def _missing(self, plans: Iterable[BatchPlan], taken: deque) -> Iterator[BatchPlan]:
        assert self.cache
        for plan in plans:
            features, is_stored = self.cache.take(self.cache.rows(plan.ids, plan.augment))
            missing = np.flatnonzero(~is_stored)
            taken.append((plan, features, missing))
            yield part_of(plan, missing)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Returns features [n, C, side, side] in the base's dtype, on the batch's device."""
        if batch.stored is None or batch.missing is None:
            return self.base(batch.images)
        features = batch.stored.to(batch.labels.device)
        if len(batch.missing):
            assert self.cache
            computed = self.base(batch.images)
            features[torch.from_numpy(batch.missing).to(features.device)] = computed
            self.cache.put(self.cache.rows(batch.ids, batch.augment)[batch.missing], computed)
        return features
