"""Reads a split's batches for one rank: staged files, decoded by the DALI pipeline in planned order."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from cifar_dist.data.batch import Batch, planned_batch
from cifar_dist.data.order import BatchPlan, ImageSpec
from cifar_dist.data.pipeline import ImagePipeline, decode
from cifar_dist.data.private import need_room, once_per_node
from cifar_dist.data.resident import ResidentImages, computes
from cifar_dist.data.staged import DataSet, StagedSplit, use_decoded
from cifar_dist.data.to_device import ToDevice
from cifar_dist.errors import UserError

DECODE_BATCH = 500
LARGEST_RESIDENT = 1 / 4  # of the GPU's free memory: the rest is the network's
DECODED_AGAIN = 64  # images that are decoded again to check existing decoded pixels


class Loader:
    """Reads batches of one split of a data set for one process.

    Raises UserError if the data set is damaged, an image cannot be decoded (with its path), or a requested decoded
    cache is impossible. With `synthetic` every batch has the same random images and labels, so reading costs no time;
    the rest of the batch is as planned.
    """

    def __init__(
        self,
        data: DataSet,
        split: str,
        spec: ImageSpec,
        *,
        device: torch.device,
        num_threads: int,
        max_batch_size: int,
        cache: str = "auto",
        cache_budget_mib: int = 2048,
        synthetic: bool = False,
    ) -> None:
        self.data, self.split, self.spec, self.device = data, split, spec, device
        self.staged: StagedSplit = data.stage(split)
        self.num_images = len(self.staged)
        self.shape = data.manifest.image_shape(split)
        self.decoded: np.ndarray | None = None
        self.resident: ResidentImages | None = None
        self._send = ToDevice(device)
        self.synthetic = None
        if synthetic:
            self.synthetic = synthetic_batch(spec, max_batch_size, data.manifest.num_classes, device)
            return
        if use_decoded(self.shape, len(self.staged), cache, cache_budget_mib):
            self.decoded = self._open_decoded(num_threads)
            if device.type == "cuda" and computes(spec, self.shape) and fits(self.decoded.nbytes, device):
                self.resident = ResidentImages(self.decoded, self.staged.labels, spec, device)
                return
        resize = self.shape != (spec.image_size, spec.image_size)
        if self.decoded is not None and not resize:
            num_threads = 1  # so little work that more threads cost more than they save
        self.pipeline = ImagePipeline(
            spec,
            max_batch_size=max_batch_size,
            encoded=self.decoded is None,
            resize=resize,
            device=device,
            num_threads=num_threads,
        )

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yields the planned batches in order. The next batch is decoded while the caller works on this batch."""
        if self.synthetic:
            images, labels = self.synthetic
            for plan in plans:
                yield planned_batch(plan, images[: len(plan.ids)], labels[: len(plan.ids)])
            return
        if self.resident:
            yield from self.resident.batches(plans)
            return
        waiting: BatchPlan | None = None
        try:
            for plan in plans:
                # Collect first: DALI must get no further batch after a failed batch.
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

    def _submit(self, plan: BatchPlan) -> None:
        if not len(plan.ids):
            return
        if self.decoded is None:
            self.pipeline.submit([self.staged.encoded(i) for i in plan.ids], plan.augment)
        else:
            self.pipeline.submit(np.asarray(self.decoded)[plan.ids], plan.augment)

    def _collect(self, plan: BatchPlan) -> Batch:
        try:
            images = self.pipeline.collect() if len(plan.ids) else torch.empty(0)
            if len(plan.ids) and images.shape[2:] != (self.spec.image_size, self.spec.image_size):
                raise RuntimeError(f"images of the shape {tuple(images.shape)}")
        except RuntimeError as error:
            raise self._named(plan.ids, error) from error
        return planned_batch(plan, images, self.labels(plan.ids))

    def labels(self, ids: np.ndarray) -> torch.Tensor:
        return self._send(self.staged.labels[ids])

    def _open_decoded(self, num_threads: int) -> np.ndarray:
        """Returns the pixels of all images, uint8 [n, H, W, 3], decoded once per node and memory-mapped."""
        assert self.shape
        file, full_shape = self.data.area / f"{self.split}.decoded", (len(self.staged), *self.shape, 3)
        once_per_node(
            file,
            make=lambda path: self._decode_all(path, num_threads),
            is_right=lambda path: self._is_decoded(path, full_shape, num_threads),
            staging=self.data.staging,
        )
        return np.memmap(file, np.uint8, "r", shape=full_shape)

    def _decode_all(self, path: Path, num_threads: int) -> None:
        """Writes the pixels of all images, followed by their SHA-256."""
        assert self.shape
        num_bytes = len(self.staged) * math.prod(self.shape) * 3
        need_room(path, num_bytes, f"decoded pixels of the {self.split} split, which --cache encoded does without,")
        digest = hashlib.sha256()
        with open(path, "wb") as file:
            for pixels in self._decode(np.arange(len(self.staged)), num_threads):
                digest.update(pixels.data)
                pixels.tofile(file)
            file.write(digest.digest())

    def _is_decoded(self, path: Path, shape: tuple[int, ...], num_threads: int) -> bool:
        """Whether the file matches its SHA-256, and images spread over the split decode to its pixels."""
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
        """Yields the images' pixels, uint8 [n, H, W, 3], in chunks."""
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
        """Returns an error that names the bad image: DALI fails a whole batch without naming it.

        Decodes the images one by one to find an image that fails or whose size differs from the manifest."""
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
                # DALI's message comes after a traceback of the pipeline's definition.
                text = " ".join(str(reason).split("encountered:")[-1].split("Current pipeline object")[0].split())
                return UserError(
                    f"image {self.staged.path(i)} (row {i} of {self.split}) cannot be decoded: DALI says {text!r}; "
                    "prepare the data set again: that checks every image and names those that are damaged"
                )
        return error


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether decoded pixels may stay in the GPU's memory."""
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= free * LARGEST_RESIDENT


def synthetic_batch(
    spec: ImageSpec, batch_size: int, num_classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random images in the pipeline's format, and labels (int64 [batch_size]), the same in every call."""
    random, (mean, std) = torch.Generator().manual_seed(0), spec.mean_and_std
    images = (torch.rand(batch_size, 3, spec.image_size, spec.image_size, generator=random) * 255 - mean) / std
    memory_format = torch.channels_last if spec.channels_last else torch.contiguous_format
    labels = torch.randint(num_classes, (batch_size,), generator=random)
    return images.to(device, memory_format=memory_format), labels.to(device)
