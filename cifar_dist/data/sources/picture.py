"""Reads images with Pillow, examines them, and turns them into bytes that DALI decodes to the same RGB pixels."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from cifar_dist.data.check import Picture
from cifar_dist.data.sources import formats
from cifar_dist.data.sources.colours import blended, colours
from cifar_dist.data.sources.fast_check import plain_file
from cifar_dist.data.sources.pillow_file import TooManyPixels, is_special, loaded, low_bytes, opened
from cifar_dist.errors import UserError

MAX_SIDE = 1_000_000  # pixels: more than libpng decodes


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How pictures are read.

    check: "full" decodes each file; "fast" takes plain files by their headers. max_pixels: of a picture.
    alpha: "drop" keeps the colours of transparent pixels; "white" and "black" lay the picture on that ground."""

    check: str = "full"
    max_pixels: int = 178_956_970
    alpha: str = "drop"


@dataclass(frozen=True)
class Item:
    """An unchecked image. `read` returns its bytes, or RGB pixels as a uint8 [H, W, 3] array.

    `path` is stored with the image. `where` names the image in messages.
    """

    path: str
    label: int
    read: Callable[[], bytes | np.ndarray]
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A checked image in one of formats.STORED, which decodes to RGB."""

    encoded: bytes
    path: str
    label: int
    encoding: str
    height: int
    width: int


@dataclass
class DeepImages:
    """Counts images with 16 bits a sample. If their values span a narrow range, few 8-bit levels are left."""

    num_images: int = 0
    largest: int = -1
    where: str = ""  # the image with the largest value

    def add(self, where: str, largest: int) -> None:
        self.num_images += 1
        if largest > self.largest:
            self.largest, self.where = largest, where

    def warning(self) -> str | None:
        """Returns a warning if no 16-bit image uses a quarter of the range, else None."""
        if not self.num_images or self.largest >= 65536 // 4:
            return None
        return (
            f"{self.where} has the largest value of the {self.num_images} 16-bit images, {self.largest} of 65535, so "
            f"{max(self.largest, 0) // 257 + 1} of 256 levels of brightness are left as 8 bits; scale the images to "
            "the full 16-bit range or to 8 bits, and prepare them again"
        )


def encode_png(pixels: np.ndarray | Image.Image) -> bytes:
    """Returns a lossless PNG of uint8 [H, W, 3] pixels or of an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Shown(NamedTuple):
    """A file as Pillow shows it.

    pixels: uint8 [H, W, 3], upright; None if the fast check took the file. encoding: the kind of file.
    height, width: upright. is_odd: whether it must be stored as a new PNG. has_alpha: whether a pixel is transparent.
    largest: the largest value on the 16-bit scale if it has over 8 bits a sample."""

    pixels: np.ndarray | None
    encoding: str
    height: int
    width: int
    is_odd: bool = False
    largest: int | None = None
    has_alpha: bool = False


def examined(item: Item, deep: DeepImages, rules: Rules = Rules()) -> Picture[Row]:
    """Reads the item. Raises UserError if the image is not readable.

    Keeps the file of an RGB image, for the check against Pillow's pixels. Other images become PNG."""
    where, content = item.where or item.path, item.read()
    if isinstance(content, np.ndarray):
        return own_picture(item, content)
    shown = show(content, where, rules)
    if shown.largest is not None:
        deep.add(where, shown.largest)
    if shown.is_odd and shown.pixels is not None:
        return own_picture(item, shown.pixels)
    size = {"height": shown.height, "width": shown.width}
    row = Row(encoded=content, path=item.path, label=item.label, encoding=shown.encoding, **size)
    return Picture(content, shown.pixels, row)


def own_picture(item: Item, pixels: np.ndarray) -> Picture[Row]:
    """Returns the item as a new PNG file, which needs no check."""
    encoded = encode_png(pixels)
    height, width = pixels.shape[:2]
    return Picture(
        encoded,
        None,
        Row(encoded=encoded, path=item.path, label=item.label, encoding="PNG", height=height, width=width),
    )


def show(content: bytes, where: str, rules: Rules) -> Shown:
    """Reads a file's bytes. Raises UserError, which names `where`, for every file that is not read."""
    if not content:
        raise UserError(f"{where} is empty (zero bytes)")
    if rules.check == "fast" and (plain := plain_file(content)):
        refuse_size(where, plain.width, plain.height, rules)
        return Shown(None, plain.encoding, plain.height, plain.width)
    if formats.raw_picture(content, where):
        raise UserError(formats.unread_sentence(content, where))
    try:
        return decoded(content, where, rules)
    except UserError:
        raise
    except TooManyPixels as error:
        raise UserError(size_sentence(where, f"{error.pixels} pixels", rules)) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(formats.unread_sentence(content, where)) from error
    except Exception as error:  # Pillow raises many types of errors for damaged files
        raise UserError(f"{where} is not a readable image: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Returns what Pillow says of a file, in words that a reader understands."""
    said = str(error).replace("\n", " ")
    if said.startswith(("decoder error", "broken data stream", "cannot load this image")):
        return f"its pixels are damaged, or compressed in a way that is not read ({said})"
    if "Decompressed data too large" in said or "memory used in text" in said:
        return f"its texts or its colour profile are too large ({said}); save it again without them"
    return said if said and not isinstance(error, LookupError) else f"it is damaged ({type(error).__name__}: {said})"


def refuse_size(where: str, width: int, height: int, rules: Rules) -> None:
    """Raises UserError for a picture of no pixels or of too many."""
    if width * height > rules.max_pixels:
        raise UserError(size_sentence(where, f"{width} x {height} pixels", rules))
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{where} has {width} x {height} pixels; images of up to {MAX_SIDE} pixels a side are read")


def size_sentence(where: str, size: str, rules: Rules) -> str:
    return f"{where} has {size}, more than --max-pixels {rules.max_pixels}; raise it, or scale the image down"


def decoded(content: bytes, where: str, rules: Rules) -> Shown:
    """Decodes a file with Pillow. Raises UserError for its size, and Pillow's errors for unknown and damaged files."""
    with opened(content, rules.max_pixels) as image:
        encoding = image.format or "unknown"
        refuse_size(where, *image.size, rules)
        is_odd = is_special(image)
        loaded(image, content, rules.max_pixels)
        is_odd = is_odd or image.mode != "RGB"
        found = colours(image, content, lambda: low_bytes(content, rules.max_pixels))
    pixels, has_alpha = found.rgb, found.alpha is not None
    if found.alpha is not None and rules.alpha != "drop":
        pixels, is_odd = blended(pixels, found.alpha, rules.alpha), True
    height, width = pixels.shape[:2]
    return Shown(pixels, encoding, height, width, is_odd, found.largest, has_alpha)
