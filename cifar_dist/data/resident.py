"""A decoded split in a device's memory: picks, flips, normalizes, resizes, crops and cuts out there, without DALI.

DALI decoded the pixels. What is computed from them here equals what pipeline.py computes; a test compares both. Of the
resizes, it computes squash without antialias only.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from cifar_dist.data.batch import Batch, planned_batch
from cifar_dist.data.order import BatchPlan, ImageSpec, no_augment
from cifar_dist.data.to_device import ToDevice

ROWS_PER_COPY = 4096


def computes(spec: ImageSpec, shape: tuple[int, int] | None) -> bool:
    """Whether ResidentImages makes what `spec` asks for from images of `shape`: (height, width), None if mixed."""
    return shape == (spec.image_size, spec.image_size) or (spec.resize == "squash" and not spec.antialias)


class ResidentImages:
    """The pixels uint8 [n, H, W, 3] and labels int64 [n] of a split on `device`, for a spec that it `computes`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, spec: ImageSpec, device: torch.device) -> None:
        assert computes(spec, (pixels.shape[1], pixels.shape[2]))
        self.spec, self.device = spec, device
        self.pixels = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
        for first in range(0, len(pixels), ROWS_PER_COPY):
            rows = slice(first, first + ROWS_PER_COPY)
            self.pixels[rows] = torch.from_numpy(np.array(pixels[rows])).to(device)
        self._labels = torch.from_numpy(labels).to(device)
        self._send = ToDevice(device)

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """Yields the planned batches in order. Waits for nothing on the device."""
        for plan in plans:
            augment = plan.augment or no_augment(len(plan.ids), self.spec.image_size)
            numbers = self._send(np.column_stack([plan.ids, *augment]))
            yield planned_batch(plan, augmented(self.pixels, numbers, self.spec), self._labels[numbers[:, 0]])


def augmented(pixels: torch.Tensor, numbers: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """Returns float32 [n, 3, S, S] in the spec's range and memory format.

    pixels: uint8 [N, H, W, 3]; numbers: int64 [n, 7], each image's row and its flips, crop and hole as in Augment.
    """
    ids, flip_x, flip_y, crop_y, crop_x, hole_y, hole_x = numbers.T
    height, width, size = pixels.shape[1], pixels.shape[2], spec.image_size
    mean, std = spec.mean_and_std
    rows = flipped(torch.arange(height, device=pixels.device), flip_y, height)
    columns = flipped(torch.arange(width, device=pixels.device), flip_x, width)
    images = (pixels[ids[:, None, None], rows[:, :, None], columns[:, None, :]].float() - mean) * (1 / std)
    images = images.permute(0, 3, 1, 2)
    if (height, width) != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    if spec.crop_padding or spec.cutout_size:
        images = cropped(images, (crop_y, crop_x), (hole_y, hole_x), spec.cutout_size, spec.fill)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def flipped(places: torch.Tensor, flip: torch.Tensor, size: int) -> torch.Tensor:
    """Returns int64 [n, size]: for each image the source of each place, mirrored where `flip` is 1."""
    return torch.where(flip[:, None] == 1, size - 1 - places, places)


Corner = tuple[torch.Tensor, torch.Tensor]  # int64 [n] each: y and x


def cropped(images: torch.Tensor, crop: Corner, hole: Corner, cutout_size: int, fill: float) -> torch.Tensor:
    """Returns the images [n, 3, S, S] shifted by their crops; `fill` is outside the image and in the holes."""
    size = images.shape[-1]
    places = torch.arange(size, device=images.device)
    rows, columns = (places + start[:, None] for start in crop)
    shown = within(rows, size)[:, :, None] & within(columns, size)[:, None, :]
    if cutout_size:
        in_rows, in_columns = (within(places - start[:, None], cutout_size) for start in hole)
        shown &= ~(in_rows[:, :, None] & in_columns[:, None, :])
    every = torch.arange(len(images), device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]
    moved = images.permute(0, 2, 3, 1)[every, rows, columns].permute(0, 3, 1, 2)
    return torch.where(shown[:, None], moved, fill)


def within(places: torch.Tensor, size: int) -> torch.Tensor:
    return (places >= 0) & (places < size)
