"""Decoded images that stay in a device's memory become the same batches as DALI's pipeline makes of them."""

from itertools import product

import numpy as np
import pytest
import torch

from cifar_dist.data.order import BatchPlan, ImageSpec, no_augment
from cifar_dist.data.pipeline import ImagePipeline
from cifar_dist.data.resident import ResidentImages, computes

CPU = torch.device("cpu")
NUM_IMAGES = 24


def both(spec: ImageSpec, shape: tuple[int, int], *, augments: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The same batch from memory and from DALI."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (NUM_IMAGES, *shape, 3), dtype=np.uint8)
    ids = random.permutation(NUM_IMAGES)[:15]
    augment = spec.draw(1, 2, ids) if augments else None
    resident = ResidentImages(pixels, np.arange(NUM_IMAGES), spec, CPU)
    (batch,) = resident.batches([BatchPlan(ids, augment, len(ids), len(ids))])
    assert batch.labels.tolist() == ids.tolist()
    resize = shape != (spec.image_size, spec.image_size)
    pipeline = ImagePipeline(spec, max_batch_size=15, encoded=False, resize=resize, device=CPU, num_threads=1)
    pipeline.submit(pixels[ids], augment or no_augment(len(ids), spec.image_size))
    return batch.images, pipeline.collect()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("input_range", ["0..1", "-1..1", "0..255"])
@pytest.mark.parametrize(
    ("flips", "crop_padding", "cutout_size"), [("none", 0, 0), ("both", 0, 0), ("horizontal", 4, 0), ("both", 5, 11)]
)
def test_the_same_batch_as_dalis(channels_last, input_range, flips, crop_padding, cutout_size) -> None:
    spec = ImageSpec(
        image_size=32,
        input_range=input_range,
        channels_last=channels_last,
        flips=flips,
        crop_padding=crop_padding,
        cutout_size=cutout_size,
    )
    mine, dalis = both(spec, (32, 32))
    assert mine.stride() == dalis.stride()
    torch.testing.assert_close(mine, dalis, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "size"), list(product([(28, 28), (20, 40)], [32, 70])))
def test_resized_images_are_dalis_to_the_rounding(shape, size) -> None:
    spec = ImageSpec(image_size=size, input_range="0..1", flips="both", crop_padding=4, cutout_size=9)
    mine, dalis = both(spec, shape)
    torch.testing.assert_close(mine, dalis, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("changes", "shape", "is_computed"),
    [
        ({}, (20, 40), True),
        ({"antialias": True}, (20, 40), False),
        ({"resize": "fit"}, (20, 40), False),
        ({"resize": "crop"}, (32, 40), False),
        ({"resize": "crop", "antialias": True}, (32, 32), True),
    ],
)
def test_a_resize_that_it_does_not_compute_is_left_to_dali(changes, shape, is_computed) -> None:
    spec = ImageSpec(image_size=32, flips="both", **changes)
    assert computes(spec, shape) == is_computed
    if is_computed:
        mine, dalis = both(spec, shape)
        torch.testing.assert_close(mine, dalis, rtol=0, atol=5e-6)
    else:
        with pytest.raises(AssertionError):
            both(spec, shape)


def test_evaluation_changes_no_image() -> None:
    spec = ImageSpec(image_size=32, flips="both", crop_padding=4, cutout_size=9)
    mine, dalis = both(spec, (32, 32), augments=False)
    torch.testing.assert_close(mine, dalis, rtol=0, atol=0)
