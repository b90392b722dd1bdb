"""The frozen base's features of each batch: computed, or kept on the node's disk once per image and variant."""

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
from cifar_dist.data.loader import Batch, Loader
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.order import Augment, Plan
from cifar_dist.data.private import keep_own, one_at_a_time
from cifar_dist.data.staged import staging_area
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import FrozenBase

LOCK_SECONDS = 120.0  # for another process to make the files


class FeatureCache:
    """Features of a split's images in one sparse file, which the processes of a node share and the next run finds.

    Row id * num_variants + variant holds one image's features as NHWC; a variant is a flip. A second file has each
    row's CRC-32, written after it: 0 says that it is not there. What a crash or the disk spoiled is computed again.
    Raises UserError where `num_bytes`, which are still to come, do not fit on the disk.
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
        """The row of each image as it is flipped."""
        variants = 0 if augment is None else augment.flips @ np.array([1, 2])
        return ids * self.num_variants + variants

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
        """(features [n, C, side, side] of the rows that are there, on the CPU; bool [n]: which they are)."""
        content = np.empty((len(rows), self.row_bytes), np.uint8)
        there = self.checks[rows] != 0
        for i in np.flatnonzero(there):
            num_read = os.preadv(self.file, [content[i]], int(rows[i]) * self.row_bytes)
            there[i] = num_read == self.row_bytes and check(content[i]) == self.checks[rows[i]]
        shape = len(rows), self.side, self.side, -1
        return torch.from_numpy(content).view(self.dtype).view(shape).permute(0, 3, 1, 2), there

    def put(self, rows: np.ndarray, features: torch.Tensor) -> None:
        """Keeps features [n, C, side, side]. Raises UserError if the disk is full."""
        images = features.permute(0, 2, 3, 1).contiguous().cpu().flatten(1).view(torch.uint8).numpy()
        try:
            for row, content in zip(rows, images, strict=True):
                written = os.pwrite(self.file, content, int(row) * self.row_bytes)
                if written < self.row_bytes:
                    raise OSError(28, "no space is left")  # as the next write would say
                self.checks[row] = check(content)
        except OSError as error:
            raise UserError(
                f"cannot keep features in {self.path}: {error}; make room, set --staging-folder, or use --features "
                "computed"
            ) from error


def check(content: np.ndarray) -> int:
    return zlib.crc32(content.data) or 1


def cache_key(base: FrozenBase, *settings: object) -> str:
    """Names all that features depend on: the base's weights, and the settings of its input."""
    digest = hashlib.sha256(repr((base.dtype, *settings)).encode())
    for tensor in base.base.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def expected_bytes(
    num_train: int, num_validation: int, num_variants: int, epochs: int, image_size: int, itemsize: int = 4
) -> int:
    """Bytes on disk after `epochs`: of V equally likely variants, V * (1 - (1 - 1/V)^epochs) have come up."""
    seen = num_variants * (1 - (1 - 1 / num_variants) ** epochs)
    row_bytes = math.ceil(image_size / 32) ** 2 * FrozenBase.num_features * itemsize
    return round((num_train * seen + num_validation) * row_bytes)


def open_cache(
    config: Config,
    manifest: Manifest,
    base: FrozenBase,
    num_images: int,
    num_used: tuple[int, int],
    staging_folder: str | None,
) -> FeatureCache:
    """This node's cache for a split of `num_images`, of which (train, validation) images are used."""
    data = config.data
    num_variants = {"none": 1, "horizontal": 2, "both": 4}[data.flips]
    itemsize = base.dtype.itemsize
    num_bytes = expected_bytes(*num_used, num_variants, config.loop.epochs, data.image_size, itemsize)
    key = cache_key(base, data.image_size, data.input_range, num_variants)
    path = staging_area(manifest, staging_folder) / f"features-{key}.bin"
    side = math.ceil(data.image_size / 32)
    return FeatureCache(path, num_images, num_variants, base, side, num_bytes)


class Features:
    """What a network with a frozen base is trained on: `batches` as the loader's, and the features of each.

    With a cache, what is there is read in `batches`, and only the other images are decoded.
    """

    def __init__(self, loader: Loader, base: FrozenBase, cache: FeatureCache | None = None) -> None:
        self.loader, self.base, self.cache = loader, base, cache

    def batches(self, plans: Iterable[Plan]) -> Iterator[Batch]:
        """The planned batches; with a cache `images` are those whose features are `missing`."""
        if self.cache is None:
            yield from self.loader.batches(plans)
            return
        taken: deque[tuple[Plan, torch.Tensor, np.ndarray]] = deque()
        for batch in self.loader.batches(self._missing(plans, taken)):
            plan, features, missing = taken.popleft()
            labels = self.loader.labels(plan.ids)
            yield replace(batch, ids=plan.ids, labels=labels, augment=plan.augment, stored=features, missing=missing)

    def _missing(self, plans: Iterable[Plan], taken: deque) -> Iterator[Plan]:
        assert self.cache
        for plan in plans:
            features, there = self.cache.take(self.cache.rows(plan.ids, plan.augment))
            missing = np.flatnonzero(~there)
            taken.append((plan, features, missing))
            augment = plan.augment and Augment(*(values[missing] for values in plan.augment))
            yield plan._replace(ids=plan.ids[missing], augment=augment)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[n, C, side, side] in the base's dtype, on the batch's device."""
        if batch.stored is None or batch.missing is None:
            return self.base(batch.images)
        features = batch.stored.to(batch.labels.device)
        if len(batch.missing):
            assert self.cache
            computed = self.base(batch.images)
            features[torch.from_numpy(batch.missing).to(features.device)] = computed
            self.cache.put(self.cache.rows(batch.ids, batch.augment)[batch.missing], computed)
        return features
