"""One image before it is stored: read with Pillow, examined, and turned into RGB bytes that DALI decodes alike."""

import io
from collections.abc import Callable
from dataclasses import dataclass

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
    """One image before it is checked: `read` gives its bytes, or finished RGB pixels as a uint8 [H, W, 3] array.

    `path` is stored with the image; `where` names it in messages.
    """

    path: str
    label: int
    read: Callable[[], bytes | np.ndarray]
    where: str = ""


@dataclass(frozen=True)
class Row:
    """One checked image: RGB when decoded, in one of FORMATS."""

    encoded: bytes
    path: str
    label: int
    encoding: str
    height: int
    width: int


@dataclass
class DeepImages:
    """The images of 16 bits a sample: 8 bits of a narrow range are few levels."""

    num_images: int = 0
    largest: int = -1
    where: str = ""  # the image with the largest value

    def add(self, where: str, largest: int) -> None:
        self.num_images += 1
        if largest > self.largest:
            self.largest, self.where = largest, where

    def warning(self) -> str | None:
        """What to tell the user where no 16-bit image uses a quarter of the range."""
        if not self.num_images or self.largest >= 65536 // 4:
            return None
        return (
            f"{self.where} has the largest value of the {self.num_images} 16-bit images, {self.largest} of 65535, so "
            f"{max(self.largest, 0) // 257 + 1} of 256 levels of brightness are left as 8 bits; scale the images to "
            "the full 16-bit range or to 8 bits, and prepare them again"
        )


def encode_png(pixels: np.ndarray | Image.Image) -> bytes:
    """Lossless PNG of uint8 [H, W, 3] pixels or of an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bit: 16-bit gray is scaled, palettes are resolved, alpha is dropped, CMYK is converted."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")


def examined(item: Item, deep: DeepImages) -> Picture[Row]:
    """Reads the item with Pillow. The file of an RGB image is kept, if it passes the check against Pillow's pixels;
    other images become PNG here."""
    where, content = item.where or item.path, item.read()
    if isinstance(content, np.ndarray):
        return own_picture(item, content)
    if not content:
        raise UserError(f"{where} is empty (zero bytes)")
    try:
        if content.startswith(PNG_START):
            with Image.open(io.BytesIO(content)) as image:
                image.verify()  # checksums and the file's end, which load() does not look at
        with Image.open(io.BytesIO(content)) as image:
            encoding = image.format or "unknown"
            if encoding not in (*FORMATS, "MPO"):
                raise UserError(f"{where} is a {encoding} file; JPEG, PNG, WebP, BMP and TIFF are read")
            image.load()
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers")
            odd = is_special(image) or image.mode != "RGB" or getattr(image, "n_frames", 1) > 1
            is_deep = has_16_bits(image, content)
            largest = int(np.asarray(image).max()) if image.mode.startswith("I") else None
            turn_upright(image)
            pixels = np.asarray(to_rgb(image))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types for damaged files; each means the same here
        reason = str(error).replace("\n", " ")
        reason = "it is no image that Pillow knows" if "cannot identify" in reason else reason
        raise UserError(f"{where} is not a readable image: {reason}") from error
    if max(pixels.shape) > MAX_SIDE:
        height, width = pixels.shape[:2]
        raise UserError(f"{where} has {width} x {height} pixels; images of up to {MAX_SIDE} pixels a side are read")
    if is_deep:
        deep.add(where, int(pixels.max()) * 257 if largest is None else largest)
    if odd:
        return own_picture(item, pixels)
    height, width = pixels.shape[:2]
    return Picture(content, pixels, Row(content, item.path, item.label, encoding, height, width))


def own_picture(item: Item, pixels: np.ndarray) -> Picture[Row]:
    """The item as a PNG file of our own, which needs no check."""
    encoded = encode_png(pixels)
    return Picture(encoded, None, Row(encoded, item.path, item.label, "PNG", *pixels.shape[:2]))


def turn_upright(image: Image.Image) -> None:
    """Turns the image as its EXIF or XMP orientation says."""
    image.getexif()  # read, so that the raw EXIF may go: exif_transpose would write it anew, and fails on odd tags
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)


def is_special(image: Image.Image) -> bool:
    """Whether DALI is known to fail on such files: the check would find each, but takes up to a second for it.

    These are MPO, which many cameras call a JPEG of two pictures, WebP with EXIF, and JPEG with EXIF twice.
    """
    segments = getattr(image, "applist", [])  # of a JPEG
    num_exif = sum(name == "APP1" and data.startswith(b"Exif") for name, data in segments)
    return image.format == "MPO" or (image.format == "WEBP" and len(image.getexif()) > 0) or num_exif > 1


def has_16_bits(image: Image.Image, content: bytes) -> bool:
    """Whether the file has more than 8 bits a sample, of which 8 are kept."""
    if image.format == "PNG":
        return content[12:16] == b"IHDR" and content[24] == 16
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,)) if isinstance(image, TiffImagePlugin.TiffImageFile) else (8,)
    return image.mode.startswith("I") or max(bits) > 8
