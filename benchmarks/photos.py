"""Draws JPEG files that cost what photos cost, for benchmarks: a megapixel, about 160 KB, each of them another.

Their brightness has the spectrum of natural scenes: the power of a detail falls with its size. At JPEG's quality of 85
that gives a photo's number of bytes, and so its time to decode. The same index gives the same file."""

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 864, 1152
QUALITY = 85
NUM_FIELDS = 6
FALL, COLOUR_FALL = 1.5, 1.7  # of the amplitude with the frequency
NUM_CLASSES = 10
TEST_SHARE = 0.2


@functools.cache
def field(index: int, fall: float) -> np.ndarray:
    """Returns float32 [HEIGHT, WIDTH] noise of mean 0 and deviation 1, whose edges fit each other."""
    draw = np.random.default_rng([index, round(10 * fall)])
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf  # no mean
    spectrum = (draw.standard_normal(frequency.shape) + 1j * draw.standard_normal(frequency.shape)) / frequency**fall
    values = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
    return (values / values.std()).astype(np.float32)


def photo(index: int) -> Image.Image:
    """Returns picture number `index`: moved noise, of its own contrast and colours."""
    draw = np.random.default_rng(index)

    def moved(fall: float) -> np.ndarray:
        shift = draw.integers(HEIGHT), draw.integers(WIDTH)
        return np.roll(field(int(draw.integers(NUM_FIELDS)), fall), shift, (0, 1))

    light = 128 + draw.uniform(35, 65) * (moved(FALL) + moved(FALL)) / 2**0.5
    red, blue = (draw.uniform(5, 25) * moved(COLOUR_FALL) for _ in range(2))
    return Image.fromarray(np.stack([light + red, light, light + blue], -1).clip(0, 255).astype(np.uint8))


def make_photos(folder: Path, num_photos: int) -> int:
    """Writes folder/SPLIT/CLASS/SPLIT-NUMBER.jpg, a fifth of them for test. Returns the number of bytes.

    Each class is in both splits: there are ten, or as many as pictures for test."""
    num_test = max(1, round(TEST_SHARE * num_photos))

    def make(index: int) -> int:
        split = "test" if index < num_test else "train"
        number = index - num_test * (split == "train")
        file = folder / split / f"class-{number % min(NUM_CLASSES, num_test)}" / f"{split}-{index:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(index).save(file, quality=QUALITY)
        return file.stat().st_size

    for index in range(NUM_FIELDS):  # once, not in each thread
        field(index, FALL), field(index, COLOUR_FALL)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(make, range(num_photos)))


def photos_in(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*/*/*.jpg"))


def repeat_photos(folder: Path, times: int, target: Path) -> None:
    """Makes a folder with every picture `times` times: hard links under other names, which take no room."""
    for file in photos_in(folder):
        place = target / file.parent.relative_to(folder)
        place.mkdir(parents=True, exist_ok=True)
        for i in range(times):
            os.link(file, place / f"{i:03d}-{file.name}")
