"""Reads images with Pillow, examines them, and turns them into bytes that DALI decodes to the same RGB pixels."""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

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
