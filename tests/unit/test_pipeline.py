"""The DALI pipeline on the CPU against an independent computation: Pillow decodes, NumPy augments, torch resizes."""

import io
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist.data.order import Augment, ImageSpec, no_augment
from cifar_dist.data.pipeline import ImagePipeline, decode

CPU = torch.device("cpu")
ALL = Augment(  # crops and holes count only where the spec has them; some lie beyond an edge
    flips=np.array([[False, False], [True, False], [False, True], [True, True], [True, False]]),
    crop=np.array([[0, 0], [4, -3], [-4, 2], [-31, 31], [1, 0]], np.int32),
    hole=np.array([[32, 32], [-3, 5], [28, 30], [10, 0], [0, -8]], np.int32),
)
# Input range -> (the value of gray level 0, the value of gray level 255).
RANGES = {"0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0), "0..255": (0.0, 255.0)}
# Pillow and DALI each bring a JPEG decoder, and the standard leaves the rounding of its cosine transform open.
TOLERANCE = {"PNG": 1.0, "JPEG": 2.0}  # grey levels of 255


@cache
def pictures(format: str, height: int = 32, width: int = 32) -> tuple[list[np.ndarray], np.ndarray]:
    """Five encoded images (uint8 [num_bytes] each) and what Pillow decodes from them (uint8 [5, height, width, 3])."""
    random = np.random.default_rng(0)
    encoded, pixels = [], []
    for _ in range(5):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), np.uint8))
        buffer = io.BytesIO()
        # Colour at full resolution: how halved colour is enlarged differs more between decoders.
        options = {"quality": 92, "subsampling": 0} if format == "JPEG" else {}
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **options)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
        pixels.append(np.asarray(Image.open(buffer)))
    return encoded, np.stack(pixels)


def rows(start: int, stop: int) -> Augment:
    return Augment(*(part[start:stop] for part in ALL))


def expected(pixels: np.ndarray, augment: Augment, spec: ImageSpec) -> torch.Tensor:
    """float32 [n, 3, S, S]: resize, then flip, the other way round than the pipeline; then crop, then cut out."""
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    size = (spec.image_size, spec.image_size)
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=False).numpy()
    flipped = np.stack(
        [
            image[:, :: -1 if vertical else 1, :: -1 if horizontal else 1]
            for image, (horizontal, vertical) in zip(resized, augment.flips, strict=True)
        ]
    )
    side = spec.image_size
    for image, (y, x), (top, left) in zip(flipped, augment.crop, augment.hole, strict=True):
        if spec.crop_padding:
            padded = np.pad(image, ((0, 0), (side, side), (side, side)), constant_values=127)
            image[:] = padded[:, side + y : 2 * side + y, side + x : 2 * side + x]
        low_y, low_x = max(top, 0), max(left, 0)
        image[:, low_y : max(top + spec.cutout_size, 0), low_x : max(left + spec.cutout_size, 0)] = 127
    low, high = RANGES[spec.input_range]
    return torch.from_numpy(low + (high - low) * flipped / 255)


def run(
    spec: ImageSpec, images: list[np.ndarray] | np.ndarray, augment: Augment | None, resize: bool, num_threads: int = 2
) -> torch.Tensor:
    pipeline = ImagePipeline(
        spec, max_batch_size=5, encoded=isinstance(images, list), resize=resize, device=CPU, num_threads=num_threads
    )
    pipeline.submit(images if isinstance(images, list) else images.copy(), augment)  # pixels are flipped in place
    return pipeline.collect()


def grey_levels(got: torch.Tensor, want: torch.Tensor, spec: ImageSpec) -> float:
    low, high = RANGES[spec.input_range]
    return (got - want).abs().max().item() * 255 / (high - low)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "decoded"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("input_range", RANGES)
@pytest.mark.parametrize("size", [32, 224])
def test_dali_equals_torch_and_numpy(size: int, input_range: str, channels_last: bool, cached: bool, format: str):
    spec = ImageSpec(image_size=size, input_range=input_range, channels_last=channels_last)
    encoded, pixels = pictures(format)
    images = next(decode([encoded], 5, 2)) if cached else encoded
    got = run(spec, images, ALL, resize=size != 32)
    assert got.shape == (5, 3, size, size)
    assert got.dtype == torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert got.is_contiguous(memory_format=memory_format)
    assert grey_levels(got, expected(pixels, ALL, spec), spec) <= TOLERANCE[format]


@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "decoded"])
@pytest.mark.parametrize(("crop", "cutout_size"), [(True, 0), (False, 8), (True, 9)])
@pytest.mark.parametrize(("size", "input_range"), [(32, "0..255"), (48, "-1..1")])
def test_crop_and_cutout_equal_numpy(size: int, input_range: str, crop: bool, cutout_size: int, cached: bool):
    spec, plain = (
        ImageSpec(
            image_size=size,
            input_range=input_range,
            channels_last=cached,
            crop_padding=4 * crop,
            cutout_size=cutout_size,
        ),
        ImageSpec(image_size=size, input_range=input_range, channels_last=cached),
    )
    encoded, pixels = pictures("PNG")
    images = pixels if cached else encoded
    got = run(spec, images, ALL, resize=size != 32)
    want = expected(pixels, ALL, spec)
    assert (want != expected(pixels, ALL, plain)).any((1, 2, 3)).sum() >= 3
    assert grey_levels(got, want, spec) <= (1e-3 if size == 32 else 1)
    untouched = run(plain, images, None, resize=size != 32)
    for augment in (None, no_augment(5, size)):
        assert torch.equal(run(spec, images, augment, resize=size != 32), untouched)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (40, 64), (17, 31)])
def test_other_sizes_are_resized_without_antialias(height: int, width: int):
    """Reduced images tell an antialiasing filter, and unequal sides a mistaken axis, by many grey levels."""
    spec = ImageSpec(image_size=32, input_range="0..255", channels_last=False)
    encoded, pixels = pictures("PNG", height, width)
    got = run(spec, encoded, ALL, resize=True)
    assert grey_levels(got, expected(pixels, ALL, spec), spec) <= 1


def test_one_batch_may_hold_images_of_several_sizes():
    spec = ImageSpec(image_size=48, input_range="0..1", channels_last=True)
    parts = [pictures("PNG", 40, 64), pictures("JPEG", 32, 32)]
    got = run(spec, [parts[0][0][0], parts[1][0][1]], rows(0, 2), resize=True)
    for i, (_, pixels) in enumerate(parts):
        want = expected(pixels[i : i + 1], rows(i, i + 1), spec)
        assert grey_levels(got[i : i + 1], want, spec) <= TOLERANCE["JPEG"]


@pytest.mark.parametrize("input_range", RANGES)
def test_black_and_white_reach_the_ends_of_the_range(input_range: str):
    images = np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)])
    got = run(ImageSpec(image_size=32, input_range=input_range, channels_last=False), images, rows(0, 2), resize=False)
    assert torch.allclose(got.amin((1, 2, 3)), torch.tensor(RANGES[input_range]), atol=1e-6)
    assert torch.allclose(got.amax((1, 2, 3)), torch.tensor(RANGES[input_range]), atol=1e-6)


@pytest.mark.parametrize("cached", [False, True], ids=["encoded", "decoded"])
def test_the_last_batch_may_be_smaller(cached: bool):
    spec = ImageSpec(image_size=32, input_range="0..255", channels_last=False, crop_padding=4, cutout_size=8)
    encoded, pixels = pictures("PNG")
    pipeline = ImagePipeline(spec, max_batch_size=5, encoded=not cached, resize=False, device=CPU, num_threads=2)
    for count in (5, 2, 5, 1):
        pipeline.submit(pixels[:count].copy() if cached else encoded[:count], rows(0, count))
        got = pipeline.collect()
        assert got.shape[0] == count
        assert grey_levels(got, expected(pixels[:count], rows(0, count), spec), spec) <= 1


def test_a_collected_batch_does_not_change_later():
    spec = ImageSpec(image_size=32, input_range="0..255", channels_last=True)
    _, pixels = pictures("PNG")
    pipeline = ImagePipeline(spec, max_batch_size=5, encoded=False, resize=False, device=CPU, num_threads=1)
    pipeline.submit(pixels.copy(), ALL)
    first = pipeline.collect()
    kept = first.clone()
    pipeline.submit(255 - pixels, ALL)
    for _ in range(4):  # two in flight, as the loader has them
        pipeline.submit(255 - pixels, ALL)
        pipeline.collect()
    assert torch.equal(first, kept)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_threads_and_batching_do_not_change_a_bit(format: str):
    spec = ImageSpec(image_size=224, input_range="-1..1", channels_last=True)
    encoded, _ = pictures(format)
    whole = run(spec, encoded, ALL, resize=True, num_threads=3)
    one_by_one = [run(spec, encoded[i : i + 1], rows(i, i + 1), resize=True, num_threads=1) for i in range(5)]
    assert torch.equal(whole, torch.cat(one_by_one))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_decode_equals_pillow(format: str):
    encoded, pixels = pictures(format, 40, 64)
    batches = list(decode([encoded[:3], encoded[3:]], 3, 2))
    assert [batch.shape for batch in batches] == [(3, 40, 64, 3), (2, 40, 64, 3)]
    error = np.abs(np.concatenate(batches).astype(int) - pixels)
    assert error.max() <= (0 if format == "PNG" else 2)  # see TOLERANCE


def test_batches_come_in_the_order_of_submission():
    spec = ImageSpec(image_size=32, input_range="0..255", channels_last=True)
    pipeline = ImagePipeline(spec, max_batch_size=2, encoded=False, resize=False, device=CPU, num_threads=2)
    for level in range(5):
        pipeline.submit(np.full((2, 32, 32, 3), level, np.uint8))
    assert [pipeline.collect().unique().tolist() for _ in range(5)] == [[level] for level in range(5)]


def test_an_unreadable_image_raises():
    encoded, _ = pictures("PNG")
    bad = [encoded[0], np.frombuffer(b"this is no picture", np.uint8)]
    with pytest.raises(RuntimeError):
        run(ImageSpec(image_size=32, input_range="0..1", channels_last=False), bad, rows(0, 2), resize=True)
    with pytest.raises(RuntimeError):
        list(decode([bad], 2, 1))
