"""Files opened with Pillow, within limits of size, and checked for what Pillow does not check."""

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from cifar_dist.data.sources.cut_files import refuse_cut_jpeg_2000, refuse_cut_tiff
from cifar_dist.data.sources.formats import READ, STORED

SUBFILE_TYPE, DNG_VERSION = 254, 50706  # TIFF tags
LIMIT = threading.Lock()  # Pillow's limit of pixels is a global variable

# Pillow remarks on odd files. What matters of it is an error here, or is seen in the check against DALI.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


class TooManyPixels(Exception):
    """A file of more pixels than the limit, before its size was known in full."""

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.pixels = pixels


@contextmanager
def pixel_limit(max_pixels: int) -> Iterator[None]:
    """Sets Pillow's limit: it then raises TooManyPixels above twice `max_pixels`."""
    with LIMIT:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        except Image.DecompressionBombError as error:
            found = re.search(r"\d+", str(error))
            raise TooManyPixels(int(found[0]) if found else 2 * max_pixels) from error
        finally:
            Image.MAX_IMAGE_PIXELS = before


def opened(content: bytes, max_pixels: int) -> Image.Image:
    """Opens a file: reads its header. Raises TooManyPixels, and Pillow's errors for unknown and damaged files."""
    with pixel_limit(max_pixels):
        return Image.open(io.BytesIO(content), formats=READ)


def loaded(image: Image.Image, content: bytes, max_pixels: int) -> None:
    """Decodes an open image and turns it upright. Raises ValueError and Pillow's errors for damaged files."""
    if image.format == "PNG":
        with opened(content, max_pixels) as file:
            file.verify()  # checks checksums and the file's end, which load() does not
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        refuse_preview(image)
        refuse_cut_tiff(image, content)
    if image.format == "JPEG2000":
        refuse_cut_jpeg_2000(content)
    with pixel_limit(max_pixels) if image.format == "TIFF" else nullcontext():  # which checks the size once more
        image.load()
    turn_upright(image)


def low_bytes(content: bytes, max_pixels: int) -> np.ndarray:
    """Returns the lower bytes, uint8 [H, W, 3], upright, of a 16-bit RGB PNG, of which Pillow gives the upper bytes."""
    with opened(content, max_pixels) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]  # PNG has the upper byte first
        image.load()
        turn_upright(image)
        return np.asarray(image)


def turn_upright(image: Image.Image) -> None:
    """Turns the image upright by its EXIF or XMP orientation."""
    image.getexif()  # cached, so the raw EXIF can go: exif_transpose would rewrite it, and fails on odd tags
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)


def refuse_preview(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raises ValueError for a TIFF whose first picture is a small copy of another, as in cameras' raw files."""
    if DNG_VERSION in image.tag_v2 or image.tag_v2.get(SUBFILE_TYPE, 0) & 1:
        raise ValueError("its first picture is a preview, as in a camera's raw file; convert it to JPEG or PNG")


def is_special(image: Image.Image) -> bool:
    """Whether a new PNG must be stored, known before the check, which takes up to a second for a file that DALI fails.

    DALI fails on MPO (a JPEG of two pictures, from many cameras), WebP with EXIF, JPEG with two EXIF segments, and
    files of several pictures, and does not read all formats.
    """
    if image.format not in STORED or getattr(image, "is_animated", False):
        return True
    segments = getattr(image, "applist", [])  # of a JPEG
    num_exif = sum(name == "APP1" and data.startswith(b"Exif") for name, data in segments)
    return (image.format == "WEBP" and len(image.getexif()) > 0) or num_exif > 1
