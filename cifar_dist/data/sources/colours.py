"""RGB and alpha of an image that Pillow has loaded, whatever its mode."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
GROUNDS = {"white": 255, "black": 0}


class Colours(NamedTuple):
    """rgb: uint8 [H, W, 3]. alpha: uint8 [H, W], 255 where opaque, or None if no pixel is transparent.

    largest: the largest value on the 16-bit scale if the file has more than 8 bits a sample, else None."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    largest: int | None


def colours(image: Image.Image, content: bytes, low_bytes: Callable[[], np.ndarray]) -> Colours:
    """Returns the colours of a loaded image of the file `content`.

    low_bytes: gives the lower byte of 16-bit RGB, uint8 [H, W, 3]. Raises ValueError for values out of range.

    16-bit values are divided by 257. Floating-point values are multiplied by 255 if they lie within 0..1, rounded
    within 0..255, and divided by 257 within 0..65535."""
    clear = clear_value(image, content)
    deep = has_16_bits(image, content)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        gray, largest = gray_8_bits(values)
        gray = 255 - gray if is_inverted(image) else gray
        alpha = None if clear is None else opaque(values != clear)
        return Colours(np.stack([gray] * 3, -1), alpha, largest)
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
        rgba = np.asarray(with_alpha(image))
        rgb, alpha = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3]
        alpha = None if alpha.min() == 255 else alpha
    else:
        rgb, alpha = np.asarray(image if image.mode == "RGB" else image.convert("RGB")), None
        if clear is not None:
            seen = rgb if not deep else rgb.astype(np.uint16) << 8 | low_bytes()
            alpha = opaque((seen != clear).any(-1))
    return Colours(rgb, alpha, int(rgb.max()) * 257 if deep else None)


def clear_value(image: Image.Image, content: bytes) -> np.ndarray | int | None:
    """Takes the one transparent gray value or colour of a file without alpha from the image; None: there is none.

    Pillow does not scale it to 8 bits, and may take a text called `transparency` for it."""
    value = image.info.get("transparency")
    if image.mode == "P" and isinstance(value, int | bytes):
        image.info["transparency"] = value if isinstance(value, int) else value[:256]
        return None
    image.info.pop("transparency", None)
    depth = content[24] if image.format == "PNG" else 8
    most = (1 << depth) - 1
    if image.mode == "RGB" and isinstance(value, tuple):
        return np.array(value) & most
    if not isinstance(value, int):
        return None
    if image.mode.startswith("I"):
        return value
    return value if image.mode == "1" else (value & most) * 255 // most


def opaque(where: np.ndarray) -> np.ndarray | None:
    """Returns alpha: 255 where `where`, else 0; None if it holds everywhere."""
    return None if where.all() else where.astype(np.uint8) * 255


def with_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return image.convert("RGBA")


def gray_8_bits(values: np.ndarray) -> tuple[np.ndarray, int | None]:
    """Returns integer or floating-point gray as uint8, and its largest value on the 16-bit scale if it exceeds 8 bits.

    Raises ValueError for values outside 0..65535."""
    least, most = values.min(), values.max()
    is_float = values.dtype.kind == "f"
    if not (least >= 0 and most <= 65535):  # also NaN
        kind = "floating-point numbers" if is_float else "integers"
        ranges = "0..1, 0..255 or 0..65535" if is_float else "0..65535"
        raise ValueError(f"its pixels are {kind} from {least:g} to {most:g}; values of {ranges} are read")
    if not is_float:
        return (values // 257).astype(np.uint8), int(most)
    scale = 255 if most <= 1 else 1 if most <= 255 else 1 / 257
    return np.rint(values * scale).astype(np.uint8), int(most) if most > 255 else None


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white in a TIFF. Pillow knows this of 8 bits only."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0


def has_16_bits(image: Image.Image, content: bytes) -> bool:
    """Whether the file has more than 8 bits a sample. Only 8 bits are kept."""
    if image.format == "PNG":
        return content[12:16] == b"IHDR" and content[24] == 16
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (8,)) if isinstance(image, TiffImagePlugin.TiffImageFile) else (8,)
    return image.mode.startswith("I") or max(bits) > 8


def blended(rgb: np.ndarray, alpha: np.ndarray, ground: str) -> np.ndarray:
    """Returns RGB over a ground in GROUNDS, rounded. rgb: uint8 [H, W, 3]; alpha: uint8 [H, W]."""
    share = alpha[..., None].astype(np.uint16)
    return ((rgb * share + GROUNDS[ground] * (255 - share) + 127) // 255).astype(np.uint8)
