"""A split's batches for one rank: order + store + pipeline."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cifar_dist.data import order
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.order import ImageSpec, Plan
from cifar_dist.data.pipeline import NORMALIZATION, ImagePipeline, decode
from cifar_dist.data.staged import StagedSplit, Staging, once_per_node, stage, staging_area, use_decoded
from cifar_dist.errors import UserError

DECODE_BATCH = 500
DECODED_AGAIN = 64  # images by which decoded pixels that are there already are held against the split


@dataclass(frozen=True)
class Batch:
    """images: float32 [n, 3, S, S]; labels: int64 [n]; ids: int64 [n] on the host; augment: what was done to them.
    stored, missing: where features are cached, those of all ids, and int64 positions of the ones that `images` are for.

    All images count, or none: a rank for which a small last step has none works on another's, with `num_counted` 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    num_counted: int
    global_size: int
    augment: order.Augment | None = None
    stored: torch.Tensor | None = None
    missing: np.ndarray | None = None


class Loader:
    """Reads batches of one split of a data set for one process.

    Raises UserError for a data set that is damaged, an image that cannot be decoded (by its path), or a decoded
    cache that was asked for and cannot be had. With `synthetic` every batch has the same random images and labels, the
    rest is as planned: what the input costs is then missing.
    """

    def __init__(
        self,
        uri: str,
        manifest: Manifest,
        split: str,
        spec: ImageSpec,
        device: torch.device,
        num_threads: int,
        max_batch_size: int,
        cache: str = "auto",
        cache_budget_mib: int = 2048,
        staging_folder: Path | str | None = None,
        synthetic: bool = False,
        staging: Staging | None = None,
    ) -> None:
        self.staged: StagedSplit = stage(uri, split, staging_folder, manifest, staging)
        self.device, self.split = device, split
        self.shape = shape = manifest.image_shape(split)
        self.image_size = spec.image_size
        self.decoded: np.ndarray | None = None
        self.synthetic = synthetic_batch(spec, max_batch_size, manifest.num_classes, device) if synthetic else None
        if synthetic:
            return
        if use_decoded(shape, len(self.staged), cache, cache_budget_mib):
            file = staging_area(manifest, staging_folder) / f"{split}.decoded"
            whole = (len(self.staged), *shape, 3)  # type: ignore[misc]
            once_per_node(
                file,
                make=lambda path: self._decode_all(path, num_threads),
                is_right=lambda path: self._is_decoded(path, whole, num_threads),
                staging=staging,
            )
            self.decoded = np.memmap(file, np.uint8, "r", shape=whole)
        resize = shape != (spec.image_size, spec.image_size)
        if self.decoded is not None and not resize:
            num_threads = 1  # a few microseconds' work: further threads cost more than they do
        self.pipeline = ImagePipeline(spec, max_batch_size, self.decoded is None, resize, device, num_threads)

    def batches(self, plans: Iterable[Plan]) -> Iterator[Batch]:
        """The planned batches in order; the next one is decoded while the caller works on this one."""
        if self.synthetic:
            images, labels = self.synthetic
            for plan in plans:
                n = len(plan.ids)
                yield Batch(images[:n], labels[:n], plan.ids, plan.num_counted, plan.global_size, plan.augment)
            return
        waiting: Plan | None = None
        try:
            for plan in plans:
                # DALI is given no batch behind one that fails.
                batch = self._collect(waiting) if waiting else None
                self._submit(plan)
                waiting = plan
                if batch:
                    yield batch
            if waiting:
                batch, waiting = self._collect(waiting), None
                yield batch
        except GeneratorExit:  # the caller left early: a batch in flight must not become the next iteration's first
            if waiting:
                self._collect(waiting)
            raise

    def _submit(self, plan: Plan) -> None:
        if not len(plan.ids):
            return
        if self.decoded is None:
            self.pipeline.submit([self.staged.encoded(i) for i in plan.ids], plan.augment)
        else:
            self.pipeline.submit(np.asarray(self.decoded)[plan.ids], plan.augment)

    def _collect(self, plan: Plan) -> Batch:
        try:
            images = self.pipeline.collect() if len(plan.ids) else torch.empty(0)
            if len(plan.ids) and images.shape[2:] != (self.image_size, self.image_size):
                raise RuntimeError(f"images of the shape {tuple(images.shape)}")
        except RuntimeError as error:
            raise self._named(plan.ids, error) from error
        return Batch(images, self.labels(plan.ids), plan.ids, plan.num_counted, plan.global_size, plan.augment)

    def labels(self, ids: np.ndarray) -> torch.Tensor:
        labels = torch.from_numpy(self.staged.labels[ids])
        if self.device.type == "cuda":  # from pinned memory the copy waits for nothing
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return labels

    def _decode_all(self, path: Path, num_threads: int) -> None:
        """Writes the pixels of all images, and their SHA-256 behind them."""
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for pixels in self._decode(np.arange(len(self.staged)), num_threads):
                digest.update(pixels.data)
                pixels.tofile(file)
            file.write(digest.digest())

    def _is_decoded(self, path: Path, shape: tuple[int, ...], num_threads: int) -> bool:
        """Whether the file holds what was written, and that is what some images spread over the split decode to."""
        if path.stat().st_size != math.prod(shape) + 32:
            return False
        pixels = np.memmap(path, np.uint8, "r", shape=shape)
        with open(path, "rb") as file:
            file.seek(-32, os.SEEK_END)
            if hashlib.sha256(pixels.data).digest() != file.read():
                return False
        rows = np.unique(np.linspace(0, len(self.staged) - 1, DECODED_AGAIN).astype(int))
        return all(np.array_equal(part, pixels[rows]) for part in self._decode(rows, num_threads))

    def _decode(self, ids: np.ndarray, num_threads: int) -> Iterator[np.ndarray]:
        """The images' pixels, some at a time."""
        chunks = np.array_split(ids, -(-len(ids) // DECODE_BATCH))
        done = iter(chunks)
        try:
            for pixels in decode(
                ([self.staged.encoded(i) for i in chunk] for chunk in chunks), DECODE_BATCH, num_threads
            ):
                ids = next(done)
                if pixels.shape[1:3] != self.shape:
                    raise self._named(ids, RuntimeError(f"pixels of the shape {pixels.shape}"))
                yield pixels
        except RuntimeError as error:
            raise self._named(next(done), error) from error

    def _named(self, ids: np.ndarray, error: RuntimeError) -> Exception:
        """DALI fails a whole batch without naming the image: decode one by one to find it, or the one of another size
        than the manifest says."""
        for i in ids:
            try:
                (pixels,) = next(decode([[self.staged.encoded(i)]], 1, 1))
                if self.shape and pixels.shape[:2] != self.shape:
                    (height, width), (own_height, own_width) = self.shape, pixels.shape[:2]
                    return UserError(
                        f"image {self.staged.path(i)} (row {i} of {self.split}) has {own_width} x {own_height} pixels, "
                        f"the manifest says {width} x {height}; prepare the data set again"
                    )
            except RuntimeError as reason:
                # Behind a traceback of the pipeline's definition.
                text = " ".join(str(reason).split("encountered:")[-1].split("Current pipeline object")[0].split())
                return UserError(
                    f"image {self.staged.path(i)} (row {i} of {self.split}) cannot be decoded: DALI says {text!r}; "
                    "prepare the data set again: that checks every image and names those that are damaged"
                )
        return error


def synthetic_batch(
    spec: ImageSpec, batch_size: int, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images as the pipeline would hand them out, and labels (int64 [batch_size]); always the same ones."""
    random, (mean, std) = torch.Generator().manual_seed(0), NORMALIZATION[spec.input_range]
    images = (torch.rand(batch_size, 3, spec.image_size, spec.image_size, generator=random) * 255 - mean) / std
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    labels = torch.randint(num_classes, (batch_size,), generator=random)
    return images.to(device, memory_format=memory_format), labels.to(device)
