"""Image files of the formats and modes that are stored as PNG, with the pixels that they hold."""

import struct
from collections.abc import Iterator

import numpy as np
from odd_pictures import bmp, chunk, picture, png, saved
from PIL import Image

BGRA = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)  # masks of a BMP


def more_formats() -> Iterator[tuple[str, bytes]]:
    pixels = picture()
    gray = pixels[..., 0]
    second = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}
    yield "gif", saved("GIF")
    yield "gif gray", saved("GIF", gray)
    yield "gif animated", saved("GIF", **second)
    yield "gif interlaced", saved("GIF", interlace=1)
    yield "avif", saved("AVIF")
    yield "avif gray", saved("AVIF", gray)
    yield "avif animated", saved("AVIF", **second)
    for mode in ("RGB", "L", "LA", "RGBA"):
        yield f"jpeg 2000 {mode}", saved("JPEG2000", Image.fromarray(pixels).convert(mode))
    yield "jpeg 2000 codestream", saved("JPEG2000", no_jp2=True)
    yield "jpeg 2000 lossy", saved("JPEG2000", irreversible=True, quality_layers=[10])
    yield "jpeg 2000 16-bit gray", saved("JPEG2000", gray.astype(np.uint16) * 257)
    for mode in ("1", "L", "RGB", "I;16"):
        image = Image.fromarray(gray.astype(np.uint16) * 257 if mode == "I;16" else pixels)
        yield f"ppm {mode}", saved("PPM", image if mode == "I;16" else image.convert(mode))
    yield "ppm plain", b"P3\n# made by hand\n2 1 15\n15 0 7  1 2 3\n"
    yield "pgm plain", b"P2 2 2 255 0 50\n100 255\n"
    yield "pbm plain", b"P1\n3 1\n101\n"
    yield "ppm 16-bit", b"P6 2 1 65535\n" + bytes(range(12))
    for mode in ("LAB", "HSV", "YCbCr", "CMYK"):
        if mode != "HSV":  # no format of Pillow's holds it
            yield f"tiff {mode}", saved("TIFF", Image.fromarray(pixels).convert(mode))
    deep = gray.astype(np.uint16) * 257
    yield "tiff 16-bit gray", saved("TIFF", deep)
    yield "tiff 16-bit gray big-endian", saved("TIFF", Image.frombytes("I;16B", (24, 16), deep.astype(">u2").tobytes()))
    yield "tiff 32-bit gray", saved("TIFF", Image.fromarray(deep.astype(np.int32)))
    yield "tiff 16-bit gray, 0 is white", saved("TIFF", deep, tiffinfo={262: 0})


def floats() -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    """Name, floating-point TIFF, and its gray as uint8; None for values that are refused."""
    gray = picture()[..., 0].astype(np.float32)
    unit, bright = gray / gray.max(), gray * (65535 / gray.max())
    good = {
        "unit": (unit, unit * 255),
        "bytes": (gray, gray),
        "halves": (gray + 0.4, gray),
        "words": (bright, bright / 257),
    }
    for name, (values, shown) in good.items():
        yield f"tiff float {name}", saved("TIFF", values), np.rint(shown).astype(np.uint8)
    holed = gray.copy()
    holed[3, 4] = np.nan
    for name, bad in {
        "negative": gray - 1,
        "large": bright + 1,
        "NaN": holed,
        "infinite": np.where(gray == 0, np.inf, gray),
    }.items():
        yield f"tiff float {name}", saved("TIFF", bad), None


def transparent() -> Iterator[tuple[str, bytes, np.ndarray, np.ndarray]]:
    """Name, file, and what it holds: RGB, uint8 [16, 24, 3], and alpha, uint8 [16, 24]."""
    rgb, (y, x) = picture(), np.mgrid[0:16, 0:24]
    alpha = (255 - 40 * (x % 5)).astype(np.uint8)
    gray = rgb[..., 0]
    grays = np.stack([gray] * 3, -1)
    half = np.where((x + y) % 3 == 0, 0, 255).astype(np.uint8)  # alpha of files with one transparent colour
    yield "png RGBA", png(np.dstack([rgb, alpha]), colour=6), rgb, alpha
    yield "png LA", png(np.dstack([gray, alpha]), colour=4), grays, alpha
    deep = (rgb.astype(np.uint16) << 8) | 7
    wide = np.dstack([deep, alpha.astype(np.uint16) * 257])
    yield "png 16 RGBA", png(wide, 16, colour=6), rgb, alpha
    yield "png 16 LA", png(wide[..., [0, 3]], 16, colour=4), grays, alpha
    for depth in (1, 2, 4, 8):
        most = (1 << depth) - 1
        level = np.where(half == 0, most, (gray % most) if most > 1 else 0)
        content = png(level, depth, chunk(b"tRNS", struct.pack(">H", most)), colour=0)
        yield f"png {depth} gray, one clear", content, np.stack([level * (255 // most)] * 3, -1).astype(np.uint8), half
    level = np.where(half == 0, 0x4455, 0x4456)  # of the same upper byte
    content = png(level, 16, chunk(b"tRNS", struct.pack(">H", 0x4455)), colour=0)
    yield "png 16 gray, one clear", content, np.full((16, 24, 3), 0x4455 // 257, np.uint8), half
    clear = np.where(half[..., None] == 0, np.uint8([9, 250, 17]), rgb)
    yield "png RGB, one clear", png(clear, 8, chunk(b"tRNS", struct.pack(">3H", 9, 250, 17))), clear, half
    deep = np.where(half[..., None] == 0, [0x1122, 0x3344, 0x5566], [0x1122, 0x3345, 0x5566])
    content = png(deep, 16, chunk(b"tRNS", struct.pack(">3H", 0x1122, 0x3344, 0x5566)))
    yield "png 16 RGB, one clear", content, (deep >> 8).astype(np.uint8), half
    yield (
        "png 16 RGB interlaced, one clear",
        png(deep, 16, chunk(b"tRNS", struct.pack(">3H", 0x1122, 0x3344, 0x5566)), interlace=1),
        (deep >> 8).astype(np.uint8),
        half,
    )
    table = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    palette = chunk(b"PLTE", table.tobytes())
    index = np.where(half == 0, 5, gray % 5)
    yield (
        "png palette, one clear",
        png(index, 8, palette, chunk(b"tRNS", b"\xff" * 5 + b"\0"), colour=3),
        table[index],
        half,
    )
    alphas = np.uint8([0, 50, 100, 200])
    content = png(gray, 8, palette, chunk(b"tRNS", alphas.tobytes()), colour=3)
    yield "png palette of alphas", content, table[gray], np.append(alphas, np.full(252, 255, np.uint8))[gray]
    rgba, la = Image.fromarray(np.dstack([rgb, alpha])), Image.fromarray(np.dstack([gray, alpha]), "LA")
    yield "webp RGBA", saved("WEBP", rgba, lossless=True, exact=True), rgb, alpha
    yield "tiff RGBA", saved("TIFF", rgba), rgb, alpha
    yield "tiff LA", saved("TIFF", la), grays, alpha
    yield "jpeg 2000 RGBA", saved("JPEG2000", rgba), rgb, alpha
    yield "jpeg 2000 LA", saved("JPEG2000", la), grays, alpha
    yield (
        "bmp 32",
        bmp(32, np.dstack([rgb[::-1, :, ::-1], alpha[::-1]]).tobytes(), 3, masks=BGRA, header=56),
        rgb,
        alpha,
    )
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette(table.tobytes())
    yield "gif, one clear", saved("GIF", image, transparency=5), table[index], half


def other_pictures() -> dict[str, bytes]:
    """Name -> file."""
    found = list(more_formats())
    found += [(name, content) for name, content, _ in floats()]
    return dict(found + [(f"alpha: {name}", content) for name, content, _, _ in transparent()])
