"""How images become square, in DALI on the CPU against torch's F.interpolate in float64: every way, shape and flip."""

import dataclasses
import io
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from cifar_dist.data import sources, store
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import Augment, ImageSpec, eval_plans, no_augment, train_plans
from cifar_dist.data.pipeline import ImagePipeline
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet

CPU = torch.device("cpu")
WAYS = list(product(["squash", "fit", "crop"], [False, True]))
FLIPS = np.array([[False, False], [True, False], [False, True], [True, True]])
TOLERANCE = 0.02  # grey levels of 255: DALI computes places in float32, in pictures of up to 500 px


def pictures(height: int, width: int, count: int = 4) -> np.ndarray:
    """Noise, uint8 [count, height, width, 3]: no two filters agree on it."""
    return np.random.default_rng(height * width).integers(0, 256, (count, height, width, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(pixels: np.ndarray) -> list[np.ndarray]:
    return [np.frombuffer(png(image), np.uint8) for image in pixels]


def flipped(count: int, size: int) -> Augment:
    return no_augment(count, size)._replace(flips=FLIPS[:count])


def run(spec: ImageSpec, images: list[np.ndarray] | np.ndarray, augment: Augment | None = None) -> torch.Tensor:
    """float32 [n, 3, S, S] of encoded images or of pixels."""
    is_encoded = isinstance(images, list)
    pipeline = ImagePipeline(
        spec, max_batch_size=len(images), encoded=is_encoded, resize=True, device=CPU, num_threads=1
    )
    pipeline.submit(images if is_encoded else np.array(images), augment)  # pixels are flipped in place
    return pipeline.collect()


def resampled(planes: torch.Tensor, extents: tuple[int, int], sizes: tuple[int, int], antialias: bool) -> torch.Tensor:
    """The centred `extents` of the images [n, 3, H, W] as `sizes` pixels, by F.interpolate of the padded images.

    The padding repeats the edges, as DALI does, makes a multiple of the extent and keeps the centre. F.interpolate by
    itself leaves out what an antialiasing filter would take from outside an image."""
    multiples, margins = [], []
    for length, extent, size in zip(planes.shape[2:], extents, sizes, strict=True):
        multiple = 2 + -(-length // extent)
        while (multiple * extent - length) % 2 or (multiple - 1) * size % 2:
            multiple += 1
            assert multiple < 2000, f"no padding centres {extent} of {length} as {size}"
        multiples.append(multiple)
        margins.append((multiple * extent - length) // 2)
    padded = F.pad(planes, (margins[1],) * 2 + (margins[0],) * 2, mode="replicate")
    large = [multiple * size for multiple, size in zip(multiples, sizes, strict=True)]
    images = F.interpolate(padded, large, mode="bilinear", align_corners=False, antialias=antialias)
    top, left = ((all_ - size) // 2 for all_, size in zip(large, sizes, strict=True))
    return images[:, :, top : top + sizes[0], left : left + sizes[1]]


def expected(spec: ImageSpec, pixels: np.ndarray, flips: np.ndarray | None = None) -> torch.Tensor:
    """float64 [n, 3, S, S] in grey levels: resized, then flipped, the other way round than the pipeline."""
    planes, size = torch.from_numpy(pixels).permute(0, 3, 1, 2).double(), spec.image_size
    height, width = planes.shape[2:]
    extents, sizes = (height, width), (size, size)
    if spec.resize == "crop":
        extents = (min(extents),) * 2
    if spec.resize == "fit":
        longest = max(extents)
        # Of the sides that leave even margins, the one nearest to the aspect ratio.
        possible = range(2 - size % 2, size + 1, 2)
        sizes = tuple(min(possible, key=lambda side: abs(side - size * own / longest)) for own in extents)
    images = torch.full((len(pixels), 3, size, size), 127.0, dtype=torch.float64)
    top, left = (size - sizes[0]) // 2, (size - sizes[1]) // 2
    images[:, :, top : top + sizes[0], left : left + sizes[1]] = resampled(planes, extents, sizes, spec.antialias)
    for image, (horizontal, vertical) in zip(images, [] if flips is None else flips, strict=flips is not None):
        image[:] = image.flip([axis for axis, flip in ((2, horizontal), (1, vertical)) if flip])
    return images


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got - want).abs().max().item()


SHAPES = [(24, 40), (25, 40), (96, 96), (20, 14), (41, 25), (150, 100)]


@pytest.mark.parametrize(("resize", "antialias"), WAYS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("is_encoded", [True, False], ids=["encoded", "decoded"])
def test_every_way_is_torchs_and_commutes_with_flips(resize, antialias, height, width, is_encoded):
    """Enlarged and reduced, wide and tall; a crop of 25 x 40 starts at half a pixel."""
    spec = ImageSpec(image_size=32, resize=resize, antialias=antialias, input_range="0..255", channels_last=is_encoded)
    pixels = pictures(height, width)
    got = run(spec, encoded(pixels) if is_encoded else pixels, flipped(4, 32))
    assert error(got, expected(spec, pixels, FLIPS)) <= TOLERANCE


@pytest.mark.parametrize(("resize", "antialias"), WAYS)
@pytest.mark.parametrize("shape", [(1, 501), (501, 1), (1, 1), (2, 4), (3, 331)])
@pytest.mark.parametrize("size", [32, 33])
def test_extreme_shapes_become_squares(resize, antialias, shape, size):
    spec = ImageSpec(image_size=size, resize=resize, antialias=antialias, input_range="0..255")
    pixels = pictures(*shape)
    got = run(spec, pixels, flipped(4, size))
    assert got.shape == (4, 3, size, size)
    assert error(got, expected(spec, pixels, FLIPS)) <= TOLERANCE


@pytest.mark.parametrize(("resize", "antialias"), WAYS)
@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (24, 41), (96, 61)])
@pytest.mark.parametrize("size", [32, 33])
def test_a_flipped_image_becomes_the_flipped_square(resize, antialias, shape, size):
    spec = ImageSpec(image_size=size, resize=resize, antialias=antialias, input_range="0..255")
    one = np.repeat(pictures(*shape, count=1), 4, axis=0)
    whole, across, down, both = run(spec, one, flipped(4, size))
    assert whole.shape == (3, size, size)
    assert error(across.flip(2), whole) <= TOLERANCE
    assert error(down.flip(1), whole) <= TOLERANCE
    assert error(both.flip(1, 2), whole) <= TOLERANCE


@pytest.mark.parametrize(("resize", "antialias"), WAYS)
def test_one_batch_may_hold_images_of_several_sizes(resize, antialias):
    """Each becomes what it becomes alone, and an image of the right size stays as it is, bit for bit."""
    spec = ImageSpec(image_size=32, resize=resize, antialias=antialias, input_range="0..255")
    shapes = [(25, 40), (32, 32), (500, 1), (90, 20)]
    images = [pictures(*shape, count=1) for shape in shapes]
    together = run(spec, [encoded(image)[0] for image in images], flipped(4, 32))
    for i, image in enumerate(images):
        augment = no_augment(1, 32)._replace(flips=FLIPS[i : i + 1])
        assert torch.equal(together[i : i + 1], run(spec, image, augment))
    assert torch.equal(together[1], torch.from_numpy(images[1][0, :, ::-1].copy()).permute(2, 0, 1).float())


def test_the_margins_of_fit_are_the_grey_of_crops_and_holes():
    spec = ImageSpec(image_size=32, resize="fit", input_range="-1..1")
    got = run(spec, pictures(10, 40))
    margins = torch.cat([got[:, :, :12], got[:, :, 20:]], dim=2)
    assert margins.unique().tolist() == [pytest.approx(spec.fill)]
    assert (got[:, :, 12:20] != margins[0, 0, 0, 0]).any((0, 1, 3)).all()


@pytest.mark.parametrize("resize", ["fit", "crop"])
def test_shifts_and_holes_are_those_of_the_square(resize):
    spec = ImageSpec(image_size=32, resize=resize, input_range="0..255", channels_last=True)
    shifts = np.array([[0, 0], [3, -4], [-5, 0], [1, 2]], np.int32)
    holes = np.array([[0, 0], [20, 5], [-3, 30], [8, 8]], np.int32)
    pixels = pictures(20, 46)
    want = F.pad(run(spec, pixels), (8, 8, 8, 8), value=127)
    want = torch.stack([image[:, 8 + y : 40 + y, 8 + x : 40 + x] for image, (y, x) in zip(want, shifts, strict=True)])
    for image, (y, x) in zip(want, holes, strict=True):
        image[:, max(y, 0) : y + 6, max(x, 0) : x + 6] = 127
    spec = dataclasses.replace(spec, crop_padding=5, cutout_size=6)
    assert torch.equal(run(spec, pixels, Augment(FLIPS & False, shifts, holes)), want)


@pipeline_def
def keras_resizing(size: int) -> Any:
    images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
    images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", std=[255.0] * 3)
    return fn.resize(images, resize_x=size, resize_y=size, interp_type=types.INTERP_LINEAR, antialias=False)


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_the_default_is_one_resize_without_antialias_bit_for_bit(height, width):
    pixels = pictures(height, width)
    pipe = keras_resizing(32, batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipe.build()
    pipe.feed_input("images", pixels)
    (want,) = pipe.run()
    assert torch.equal(run(ImageSpec(image_size=32), pixels), torch.from_numpy(want.as_array()))


def prepared(folder: Path, shapes: list[tuple[int, int]]) -> str:
    """A data set with a picture of each shape in its train and its test split."""
    pixels = [pictures(*shape, count=1)[0] for shape in shapes]
    items = [sources.Item(str(i), i % 2, lambda image=image: png(image)) for i, image in enumerate(pixels)]
    splits = {"train": items, "test": items}
    store.prepare(sources.Source.of("odd", ["a", "b"], splits), str(folder))
    return str(folder)


@pytest.mark.parametrize(("resize", "antialias"), WAYS)
@pytest.mark.parametrize("shapes", [[(25, 40)] * 4, [(25, 40), (32, 32), (60, 20), (1, 9)]], ids=["one", "mixed"])
def test_training_and_evaluation_see_the_same_squares(resize, antialias, shapes, tmp_path):
    spec = ImageSpec(image_size=32, resize=resize, antialias=antialias, input_range="0..255")
    data = DataSet.open(prepared(tmp_path / "data", shapes), Staging(folder=tmp_path / "staged"))
    want = torch.cat([expected(spec, pictures(*shape, count=1)) for shape in shapes])
    ids = np.arange(len(shapes))
    settings = {"seed": 0, "epoch": 0, "first_step": 0, "global_batch_size": 4, "rank": 0, "world": 1}
    for split, cache in product(["train", "test"], ["encoded", "auto"]):
        loader = Loader(data, split, spec, device=CPU, num_threads=1, max_batch_size=4, cache=cache)
        assert (loader.decoded is None) == (cache == "encoded" or len(set(shapes)) > 1)
        for plans in (eval_plans(ids, 4, 0, 1), train_plans(ids, spec, **settings)):
            (batch,) = loader.batches(plans)
            assert error(batch.images, want[batch.ids]) <= TOLERANCE
