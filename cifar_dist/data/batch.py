"""A batch of images for one rank."""

from dataclasses import dataclass

import numpy as np
import torch

from cifar_dist.data.order import Augment, BatchPlan


@dataclass(frozen=True, kw_only=True)
class Batch:
    """images: float32 [n, 3, S, S]; labels: int64 [n]; ids: int64 [n] on the host; augment: applied to the images.
    stored: cached features of all ids; missing: int64 positions still to be computed from `images`.

    All images count, or none. A small last step may have none for a rank. The rank then works on another rank's images,
    with `num_counted` 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: np.ndarray
    num_counted: int
    global_size: int
    augment: Augment | None = None
    stored: torch.Tensor | None = None
    missing: np.ndarray | None = None


def planned_batch(plan: BatchPlan, images: torch.Tensor, labels: torch.Tensor) -> Batch:
    return Batch(images=images, labels=labels, **plan._asdict())
