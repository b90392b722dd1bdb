"""A split's batches for one rank: order + store + pipeline."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cifar_dist.data import order
from cifar_dist.data.pipeline import ImagePipeline, decode
from cifar_dist.data.spec import ImageSpec
from cifar_dist.data.store import Manifest, StagedSplit, once_per_node, stage, staging_area, use_decoded
from cifar_dist.errors import UserError

DECODE_BATCH = 500


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

    All images count, or none: a rank whose part of a small last step is empty gets one image and `num_counted` 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    num_counted: int
    global_size: int
    augment: order.Augment | None = None


class Loader:
    """Reads batches of one split of a data set for one process.

    Raises UserError for a data set that is damaged, an image that cannot be decoded (by its path), or a decoded
    cache that was asked for and cannot be had.
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
    ) -> None:
        self.staged: StagedSplit = stage(uri, split, staging_folder, manifest)
        self.device = device
        shape = manifest.image_shape(split)
        self.decoded: np.ndarray | None = None
        if use_decoded(shape, len(self.staged), cache, cache_budget_mib):
            file = staging_area(manifest, staging_folder) / f"{split}.decoded"
            once_per_node(file, lambda path: self._decode_all(path, num_threads))
            self.decoded = np.memmap(file, np.uint8, "r").reshape(len(self.staged), *shape, 3)  # type: ignore[misc]
        self.pipeline = ImagePipeline(
            spec,
            max_batch_size,
            encoded=self.decoded is None,
            resize=shape != (spec.image_size, spec.image_size),
            device=device,
            num_threads=num_threads,
        )

    def batches(self, plans: Iterable[Plan]) -> Iterator[Batch]:
        """The planned batches in order; the next one is decoded while the caller works on this one."""
        waiting: Plan | None = None
        try:
            for plan in plans:
                ready = waiting and self._collect(waiting)
                self._submit(plan)
                waiting = plan
                if ready:
                    yield ready
        except GeneratorExit:  # the caller left early: the batch in flight must not become the next iteration's first
            if waiting:
                self._collect(waiting)
            raise
        if waiting:
            yield self._collect(waiting)

    def _submit(self, plan: Plan) -> None:
        images = [self.staged.encoded(i) for i in plan.ids] if self.decoded is None else self.decoded[plan.ids]
        self.pipeline.submit(images, plan.augment)

    def _collect(self, plan: Plan) -> Batch:
        try:
            images = self.pipeline.collect()
        except RuntimeError as error:
            raise self._named(plan.ids, error) from error
        labels = torch.from_numpy(self.staged.labels[plan.ids])
        if self.device.type == "cuda":  # from pinned memory the copy waits for nothing
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return Batch(images, labels, plan.ids, plan.num_counted, plan.global_size, plan.augment)

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
    for step in range(first_step, order.num_steps(len(ids), global_batch_size)):
        start, stop, size = order.rank_part(step, len(ids), global_batch_size, rank, world)
        part = shuffled[start : max(stop, start + 1)] if start < len(ids) else shuffled[-1:]
        yield Plan(part, augmentation.draw(seed, epoch, part), stop - start, size)


def eval_plans(ids: np.ndarray, batch_size: int, rank: int, world: int) -> Iterator[Plan]:
    """Every id exactly once over all ranks: a fixed grid of batches, of which a rank takes a contiguous run.

    The grid does not depend on the world size, so neither does any floating-point result.
    """
    num_batches = order.num_steps(len(ids), batch_size)
    for b in range(rank * num_batches // world, (rank + 1) * num_batches // world):
        part = ids[b * batch_size : (b + 1) * batch_size]
        yield Plan(part, None, len(part), len(part))
