"""Reads images with Pillow, examines them, and turns them into bytes that DALI decodes to the same RGB pixels."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from cifar_dist.data.check import Picture
from cifar_dist.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_SIDE = 1_000_000  # pixels: more than libpng decodes
PNG_START = b"\x89PNG"
BITS_PER_SAMPLE = 258  # the TIFF tag


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
    """A checked image in one of FORMATS, which decodes to RGB."""

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


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as 8-bit RGB. Scales 16-bit gray, resolves palettes, drops alpha and converts CMYK."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


class Shown(NamedTuple):
    """A file as Pillow shows it. pixels: uint8 [H, W, 3], upright. encoding: the kind of file.

    is_odd: whether it must be stored as a new PNG. largest: the largest 16-bit value if it has over 8 bits a sample."""

    pixels: np.ndarray
    encoding: str
    is_odd: bool
    largest: int | None


def examined(item: Item, deep: DeepImages) -> Picture[Row]:
    """Reads the item with Pillow. Raises UserError if the image is not readable.

    Keeps the file of an RGB image, for the check against Pillow's pixels. Other images become PNG."""
    where, content = item.where or item.path, item.read()
    if isinstance(content, np.ndarray):
        return own_picture(item, content)
    if not content:
        raise UserError(f"{where} is empty (zero bytes)")
    try:
        shown = show(content, where)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types of errors for damaged files
        reason = str(error).replace("\n", " ")
        reason = "it is no image that Pillow knows" if "cannot identify" in reason else reason
        raise UserError(f"{where} is not a readable image: {reason}") from error
    height, width = shown.pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise UserError(f"{where} has {width} x {height} pixels; images of up to {MAX_SIDE} pixels a side are read")
    if shown.largest is not None:
        deep.add(where, shown.largest)
    if shown.is_odd:
        return own_picture(item, shown.pixels)
    return Picture(
        content,
        shown.pixels,
        Row(encoded=content, path=item.path, label=item.label, encoding=shown.encoding, height=height, width=width),
    )


def show(content: bytes, where: str) -> Shown:
    """Opens a file with Pillow. Raises UserError for unsupported kinds of files, and Pillow's errors for bad files."""
    if content.startswith(PNG_START):
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # checks checksums and the file's end, which load() does not
    with Image.open(io.BytesIO(content)) as image:
        encoding = image.format or "unknown"
        if encoding not in (*FORMATS, "MPO"):
            raise UserError(f"{where} is a {encoding} file; JPEG, PNG, WebP, BMP and TIFF are read")
        image.load()
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        is_odd = is_special(image) or image.mode != "RGB" or getattr(image, "n_frames", 1) > 1
        is_deep = has_16_bits(image, content)
        largest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
        turn_upright(image)
        pixels = np.asarray(to_rgb(image))
    if is_deep and largest is None:
        largest = int(pixels.max()) * 257
    return Shown(pixels, encoding, is_odd, largest if is_deep else None)


def own_picture(item: Item, pixels: np.ndarray) -> Picture[Row]:
    """Returns the item as a new PNG file, which needs no check."""
    encoded = encode_png(pixels)
    height, width = pixels.shape[:2]
    return Picture(
        encoded,
        None,
        Row(encoded=encoded, path=item.path, label=item.label, encoding="PNG", height=height, width=width),
    )


def turn_upright(image: Image.Image) -> None:
    """Turns the image upright by its EXIF or XMP orientation."""
    image.getexif()  # cached, so the raw EXIF can go: exif_transpose would rewrite it, and fails on odd tags
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)


def is_special(image: Image.Image) -> bool:
    """Whether DALI is known to fail on such a file. The check would find this too, but takes up to a second a file.

    DALI fails on MPO (a JPEG of two pictures, from many cameras), WebP with EXIF, and JPEG with two EXIF segments.
    """
    segments = getattr(image, "applist", [])  # of a JPEG
    num_exif = sum(name == "APP1" and data.startswith(b"Exif") for name, data in segments)
    return image.format == "MPO" or (image.format == "WEBP" and len(image.getexif()) > 0) or num_exif > 1


def has_16_bits(image: Image.Image, content: bytes) -> bool:
    """Whether the file has more than 8 bits a sample. Only 8 bits are kept."""
    if image.format == "PNG":
        return content[12:16] == b"IHDR" and content[24] == 16
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,)) if isinstance(image, TiffImagePlugin.TiffImageFile) else (8,)
    return image.mode.startswith("I") or max(bits) > 8
