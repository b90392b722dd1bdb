"""A split's batches for one rank: order + store + pipeline."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cifar_dist.data import order
from cifar_dist.data.pipeline import NORMALIZATION, ImagePipeline, decode
from cifar_dist.data.spec import ImageSpec
from cifar_dist.data.store import Manifest, StagedSplit, once_per_node, stage, staging_area, use_decoded
from cifar_dist.errors import UserError

DECODE_BATCH = 500
STEPS_PER_DRAW = 32  # of augmentation: to draw for one step costs hardly less


class Plan(NamedTuple):
    """One batch before it is read: row ids, what happens to each image, how many of the ids count, and the global
    batch's size."""

    ids: np.ndarray
    augment: order.Augment | None
    num_counted: int
    global_size: int


@dataclass(frozen=True)
class Batch:
    """images: float32 [n, 3, S, S]; labels: int64 [n]; ids: int64 [n] on the host; augment: what was done to them.
    stored, missing: where features are cached, those of all ids, and int64 positions of the ones that `images` are for.

    All images count, or none: a rank whose part of a small last step is empty gets one image and `num_counted` 0.
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
    ) -> None:
        self.staged: StagedSplit = stage(uri, split, staging_folder, manifest)
        self.device = device
        shape = manifest.image_shape(split)
        self.decoded: np.ndarray | None = None
        self.synthetic = synthetic_batch(spec, max_batch_size, manifest.num_classes, device) if synthetic else None
        if synthetic:
            return
        if use_decoded(shape, len(self.staged), cache, cache_budget_mib):
            file = staging_area(manifest, staging_folder) / f"{split}.decoded"
            once_per_node(file, lambda path: self._decode_all(path, num_threads))
            self.decoded = np.memmap(file, np.uint8, "r").reshape(len(self.staged), *shape, 3)  # type: ignore[misc]
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
        waiting: deque[Plan] = deque()
        try:
            for plan in plans:
                self._submit(plan)  # before the wait for the one before it: DALI never runs dry
                waiting.append(plan)
                if len(waiting) > 1:
                    yield self._collect(waiting.popleft())
            if waiting:
                yield self._collect(waiting.popleft())
        except GeneratorExit:  # the caller left early: batches in flight must not become the next iteration's first
            while waiting:
                self._collect(waiting.popleft())
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
        except RuntimeError as error:
            raise self._named(plan.ids, error) from error
        return Batch(images, self.labels(plan.ids), plan.ids, plan.num_counted, plan.global_size, plan.augment)

    def labels(self, ids: np.ndarray) -> torch.Tensor:
        labels = torch.from_numpy(self.staged.labels[ids])
        if self.device.type == "cuda":  # from pinned memory the copy waits for nothing
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return labels

    def _decode_all(self, path: Path, num_threads: int) -> None:
        chunks = np.array_split(np.arange(len(self.staged)), -(-len(self.staged) // DECODE_BATCH))
        encoded = ([self.staged.encoded(i) for i in chunk] for chunk in chunks)
        with open(path, "wb") as file:
            try:
                for pixels in decode(encoded, DECODE_BATCH, num_threads):
                    pixels.tofile(file)
            except RuntimeError as error:
                raise self._named(np.arange(len(self.staged)), error) from error

    def _named(self, ids: np.ndarray, error: RuntimeError) -> Exception:
        """DALI fails a whole batch without naming the image: decode one by one to find it."""
        for i in ids:
            try:
                next(decode([[self.staged.encoded(i)]], 1, 1))
            except RuntimeError as reason:
                text = str(reason).split("Error in")[-1].splitlines()[0][:200]
                return UserError(
                    f"image {self.staged.path(i)} (row {i}) cannot be decoded: {text}; prepare the data again"
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


def train_plans(
    ids: np.ndarray,
    augmentation: order.Augmentation,
    seed: int,
    epoch: int,
    first_step: int,
    global_batch_size: int,
    rank: int,
    world: int,
) -> Iterator[Plan]:
    """This rank's part of every step of an epoch from `first_step` on."""
    shuffled = ids[order.epoch_order(seed, epoch, len(ids))]
    num_steps = order.num_steps(len(ids), global_batch_size)
    for first in range(first_step, num_steps, STEPS_PER_DRAW):
        steps = range(first, min(first + STEPS_PER_DRAW, num_steps))
        places = [order.rank_part(step, len(ids), global_batch_size, rank, world) for step in steps]
        parts = [
            shuffled[start : max(stop, start + 1)] if start < len(ids) else shuffled[-1:] for start, stop, _ in places
        ]
        drawn = augmentation.draw(seed, epoch, np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        augments = map(order.Augment, *(np.split(values, ends) for values in drawn))
        for (start, stop, size), part, augment in zip(places, parts, augments, strict=True):
            yield Plan(part, augment, stop - start, size)


def eval_plans(ids: np.ndarray, batch_size: int, rank: int, world: int) -> Iterator[Plan]:
    """Every id exactly once over all ranks: a fixed grid of batches, of which a rank takes a contiguous run.

    The grid does not depend on the world size, so neither does any floating-point result.
    """
    num_batches = order.num_steps(len(ids), batch_size)
    for b in range(rank * num_batches // world, (rank + 1) * num_batches // world):
        part = ids[b * batch_size : (b + 1) * batch_size]
        yield Plan(part, None, len(part), len(part))
