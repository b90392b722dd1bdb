"""Reads two splits as one: the ids of the second split's images follow those of the first's."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from cifar_dist.data.batch import Batch
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import BatchPlan


class JoinedLoader:
    """A loader of two splits of a data set, for which training needs train and a validation split of its own.

    Row i of the second split has the id num_first + i, so whatever is kept by id is never another split's. The splits
    may differ in image size. All images of a plan are of one split.
    """

    def __init__(self, first: Loader, second: Loader) -> None:
        self.first, self.second, self.num_first = first, second, first.num_images
        self.num_images = first.num_images + second.num_images
        self.data, self.spec, self.device = first.data, first.spec, first.device

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yields the planned batches in order. Raises like Loader."""
        for is_second, group in groupby(plans, lambda plan: self._is_second(plan.ids)):
            if not is_second:
                yield from self.first.batches(group)
                continue
            rows = (plan._replace(ids=plan.ids - self.num_first) for plan in group)
            for batch in self.second.batches(rows):
                yield replace(batch, ids=batch.ids + self.num_first)

    def labels(self, ids: np.ndarray) -> torch.Tensor:
        """Returns the labels of images of one split, int64 [len(ids)], on the device."""
        return self.second.labels(ids - self.num_first) if self._is_second(ids) else self.first.labels(ids)

    def _is_second(self, ids: np.ndarray) -> bool:
        is_second = ids >= self.num_first
        if is_second.any() and not is_second.all():  # a negative row would be read from the end of the split
            raise ValueError("the images of a batch are of two splits")
        return bool(is_second.any())


AnyLoader = Loader | JoinedLoader
