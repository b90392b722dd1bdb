"""Image files that programs read differently: orientations in odd places and types, rare layouts, damage."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION = 0x0112  # the EXIF and TIFF tag
TYPES = {"BYTE": (1, "B"), "SHORT": (3, "H"), "LONG": (4, "I"), "RATIONAL": (5, "I"), "SSHORT": (8, "h")}


def picture(width: int = 24, height: int = 16) -> np.ndarray:
    """uint8 [height, width, 3] without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    corner = np.where((x < width / 3) & (y < height / 3), 230, 40)
    return (np.stack([x * 9, y * 14, corner], -1) % 256).astype(np.uint8)


def saved(format: str, pixels: np.ndarray | Image.Image | None = None, **options: Any) -> bytes:
    """The picture, or another one, as Pillow saves it."""
    pixels = picture() if pixels is None else pixels
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff_header(value: int, kind: str = "SHORT", order: str = ">", count: int = 1) -> bytes:
    """A TIFF header with one tag, the orientation, as EXIF holds it."""
    number, letter = TYPES[kind]
    size = struct.calcsize(letter)
    values = [value, 1] if kind == "RATIONAL" else [value] * count
    data = struct.pack(f"{order}{len(values)}{letter}", *values)
    start = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}IH", 8, 1)
    entry = struct.pack(f"{order}HHI", ORIENTATION, number, count)
    if size * len(values) > 4:
        return start + entry + struct.pack(f"{order}II", 26, 0) + data
    return start + entry + data.ljust(4, b"\0") + struct.pack(f"{order}I", 0)


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def exif(*args: Any, **options: Any) -> bytes:
    return segment(0xE1, b"Exif\0\0" + tiff_header(*args, **options))


def xmp(value: int, attribute: bool = True) -> bytes:
    inner = f' tiff:Orientation="{value}"/>' if attribute else f"><tiff:Orientation>{value}</tiff:Orientation></x>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><x{inner}</x:xmpmeta>'.encode()


def xmp_segment(*args: Any) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(*args))


def jpeg_with(*segments: bytes, jfif: bool = True, **options: Any) -> bytes:
    """A JPEG with segments behind its JFIF header, or in its place."""
    content = saved("JPEG", **options)
    assert content[2:4] == b"\xff\xe0"
    return content[: 20 if jfif else 2] + b"".join(segments) + content[20:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, depth: int = 8, *chunks: bytes, colour: int = 2, interlace: int = 0) -> bytes:
    """A PNG written by hand: `pixels` are [H, W] or [H, W, channels], of `depth` bits."""
    height, width = pixels.shape[:2]
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b""
    for y, x, down, right in starts if interlace else [(0, 0, 1, 1)]:
        part = pixels[y::down, x::right]
        for line in part if part.size else []:
            if depth == 16:
                packed = line.astype(">u2").tobytes()
            elif depth == 8:
                packed = line.astype(np.uint8).tobytes()
            else:
                bits = (line.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1
                packed = np.packbits(bits.astype(np.uint8)).tobytes()
            lines += b"\0" + packed
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def bmp(bits: int, pixels: bytes, compression: int = 0, height: int = 16, masks: bytes = b"", **options: Any) -> bytes:
    """A BMP of 24 x 16 pixels; `os2`: the header of OS/2, `header`: its size, `palette`: colours."""
    palette = options.get("palette", b"")
    if options.get("os2"):
        header = struct.pack("<IHHHH", 12, 24, height, 1, bits)
    else:
        size = len(pixels)
        header = (
            struct.pack(
                "<IiiHHIIiiII", options.get("header", 40), 24, height, 1, bits, compression, size, 2835, 2835, 0, 0
            )
            + masks
        )
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels


def tiff(planes: list[np.ndarray], order: str = "<", orientation: tuple[str, int] | None = None) -> bytes:
    """An RGB TIFF written by hand: one plane [H, W, 3], or three [H, W] in strips of their own; 8 or 16 bits."""
    height, width = planes[0].shape[:2]
    bits = planes[0].dtype.itemsize * 8
    strips = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    n = len(strips)
    tags: list[tuple[int, str, list[int]]] = [(256, "SHORT", [width]), (257, "SHORT", [height])]
    tags += [(258, "SHORT", [bits] * 3), (259, "SHORT", [1]), (262, "SHORT", [2]), (273, "LONG", [0] * n)]
    tags += [(ORIENTATION, orientation[0], [orientation[1]])] if orientation else []
    tags += [(277, "SHORT", [3]), (278, "SHORT", [height]), (279, "LONG", [len(strip) for strip in strips])]
    tags += [(284, "SHORT", [2 if n > 1 else 1])]
    heap = 8 + 2 + 12 * len(tags) + 4
    data = heap + 6 + 2 * 4 * n
    offsets = np.cumsum([data, *map(len, strips)])[:n].tolist()
    entries, extra = b"", b""
    for tag, kind, values in tags:
        number, letter = TYPES[kind]
        packed = struct.pack(f"{order}{len(values)}{letter}", *(offsets if tag == 273 else values))
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", heap + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, number, len(values)) + packed.ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags))
    content = start + entries + struct.pack(f"{order}I", 0) + extra
    return content.ljust(data, b"\0") + b"".join(strips)


def turned_jpegs() -> Iterator[tuple[str, bytes]]:
    for order in "<>":
        for kind in ("BYTE", "SHORT", "LONG", "RATIONAL", "SSHORT"):
            for value in (0, 1, 6, 9) if kind != "SHORT" else (*range(10), 255, 65535):
                yield f"jpeg {kind} {value} {order}", jpeg_with(exif(value, kind, order))
        yield f"jpeg LONG 65542 {order}", jpeg_with(exif(65542, "LONG", order))  # 6 in the lower half
        for kind in ("SHORT", "LONG"):
            for count in (0, 2, 3):
                yield f"jpeg {kind} x {count} {order}", jpeg_with(exif(6, kind, order, count=count))
    yield "jpeg without JFIF", jpeg_with(exif(6), jfif=False)
    for first, second in ((6, 3), (1, 6), (6, 1), (0, 6), (9, 6)):
        yield f"jpeg two EXIF {first} {second}", jpeg_with(exif(first), exif(second))
    yield "jpeg EXIF without a tag, then one", jpeg_with(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"), exif(6))
    yield "jpeg EXIF in parts", jpeg_with(*(segment(0xE1, b"Exif\0\0" + part) for part in (b"MM\0*", exif(6)[14:])))
    yield "jpeg EXIF behind a comment", jpeg_with(segment(0xFE, b"hello"), exif(6))
    yield "jpeg EXIF behind the tables", saved("JPEG")[:-2].replace(b"\xff\xda", exif(6) + b"\xff\xda", 1) + b"\xff\xd9"
    yield "jpeg Exif padded", jpeg_with(segment(0xE1, b"Exif\0\xff" + tiff_header(6)))
    yield "jpeg EXIF cut off", jpeg_with(segment(0xE1, b"Exif\0\0" + tiff_header(6)[:16]))
    for value in (1, 3, 6, 9):
        yield f"jpeg XMP {value}", jpeg_with(xmp_segment(value))
        yield f"jpeg XMP element {value}", jpeg_with(xmp_segment(value, False))
        yield f"jpeg XMP {value} and EXIF", jpeg_with(exif(8), xmp_segment(value))
        yield f"jpeg XMP {value} before EXIF", jpeg_with(xmp_segment(value), exif(8))


def turned_others() -> Iterator[tuple[str, bytes]]:
    for value in (0, 1, 3, 6, 8, 9):
        for kind in ("SHORT", "LONG"):
            for order in "<>":
                name = f"{kind} {value} {order}"
                chunks = chunk(b"eXIf", tiff_header(value, kind, order))
                yield f"png {name}", png(picture(), 8, chunks)
                yield f"webp {name}", saved("WEBP", lossless=True, exif=tiff_header(value, kind, order))
                yield f"webp Exif00 {name}", saved("WEBP", exif=b"Exif\0\0" + tiff_header(value, kind, order))
                yield f"tiff {name}", tiff([picture()], order, (kind, value))
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp(value).decode())
        yield f"png XMP {value}", saved("PNG", pnginfo=text)
        yield f"webp XMP {value}", saved("WEBP", lossless=True, xmp=xmp(value))
        yield f"tiff XMP {value}", saved("TIFF", tiffinfo={700: xmp(value)})
        data = tiff_header(value)
        raw = PngImagePlugin.PngInfo()
        raw.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
        yield f"png raw EXIF {value}", saved("PNG", pnginfo=raw)
    yield (
        "png eXIf behind the pixels",
        png(picture()).replace(chunk(b"IEND", b""), b"") + chunk(b"eXIf", tiff_header(6)) + chunk(b"IEND", b""),
    )


def layouts() -> Iterator[tuple[str, bytes]]:
    pixels = picture()
    deep = pixels.astype(np.uint16) * 257 - np.arange(24, dtype=np.uint16)[None, :, None] % 3
    gray = pixels[..., 0]
    yield "tiff planar 16", tiff([np.ascontiguousarray(deep[..., i]) for i in range(3)])
    yield "tiff planar 16 big-endian", tiff([np.ascontiguousarray(deep[..., i]) for i in range(3)], ">")
    yield "tiff planar 8", tiff([np.ascontiguousarray(pixels[..., i]) for i in range(3)])
    yield "tiff chunky 16", tiff([deep])
    yield "tiff chunky 16 big-endian", tiff([deep], ">")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma"):
        yield f"tiff {compression}", saved("TIFF", compression=compression)
    yield "tiff lzw with predictor", saved("TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    yield "tiff of two pages", saved("TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    for mode in ("CMYK", "RGBA", "L", "1", "P", "LA", "YCbCr"):
        yield f"tiff {mode}", saved("TIFF", Image.fromarray(pixels).convert(mode))
    yield "png 16 RGB", png(deep, 16)
    yield "png 16 gray", png(deep[..., 0], 16, colour=0)
    yield "png 16 RGBA", png(np.concatenate([deep, deep[..., :1]], -1), 16, colour=6)
    for depth in (1, 2, 4):
        yield f"png {depth} gray", png(gray >> (8 - depth), depth, colour=0)
        palette = chunk(b"PLTE", bytes(range(3 << depth)))
        yield f"png {depth} palette", png(gray >> (8 - depth), depth, palette, colour=3)
    yield "png interlaced", png(pixels, interlace=1)
    yield "png RGB with a transparent colour", png(pixels, 8, chunk(b"tRNS", bytes([0, 0, 0, 0, 0, 230])))
    yield "png gamma", png(pixels, 8, chunk(b"gAMA", struct.pack(">I", 100000)))
    yield "png sRGB", png(pixels, 8, chunk(b"sRGB", b"\0"))
    yield "png background", png(pixels, 8, chunk(b"bKGD", bytes(6)))
    yield "apng", saved("PNG", save_all=True, append_images=[Image.new("RGB", (24, 16), "red")])
    swapped = pixels[..., ::-1]
    rows = swapped[::-1].tobytes()
    yield "bmp top-down", bmp(24, swapped.tobytes(), height=-16)
    yield "bmp os2", bmp(24, rows, os2=True)
    yield "bmp 32", bmp(32, np.dstack([swapped[::-1], np.zeros((16, 24), np.uint8)]).tobytes())
    yield "bmp 32 with alpha", bmp(32, np.dstack([swapped[::-1], gray]).tobytes())
    five = (pixels[::-1] >> 3).astype(np.uint16)
    yield "bmp 555", bmp(16, (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]).astype("<u2").tobytes())
    six = (pixels[::-1, :, 1] >> 2).astype(np.uint16)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    yield "bmp 565", bmp(16, (five[..., 0] << 11 | six << 5 | five[..., 2]).astype("<u2").tobytes(), 3, masks=masks)
    palette = bytes(v for i in range(256) for v in (i, 255 - i, i // 2, 0))
    yield "bmp palette", bmp(8, gray.tobytes(), palette=palette)
    runs = b"".join(b"".join(bytes([1, v]) for v in line) + b"\0\0" for line in gray) + b"\0\1"
    yield "bmp RLE", bmp(8, runs, 1, palette=palette)
    yield "bmp RLE without all pixels", bmp(8, runs[:300] + b"\0\1", 1, palette=palette)
    yield "webp lossy", saved("WEBP", quality=60)
    yield "webp alpha", saved("WEBP", Image.fromarray(pixels).convert("RGBA"))
    yield "webp animated", saved("WEBP", save_all=True, append_images=[Image.new("RGB", (24, 16), "red")])
    for size in ((1, 1), (3, 5), (1, 40), (17, 31), (100, 75)):
        for sampling in (0, 1, 2):
            for progressive in (False, True):
                name = f"jpeg {size} {sampling} {'progressive' if progressive else ''}"
                yield name, saved("JPEG", picture(*size), subsampling=sampling, progressive=progressive, quality=70)
    yield "jpeg RGB inside", saved("JPEG", keep_rgb=True)
    yield "jpeg restarts", saved("JPEG", restart_marker_blocks=1)
    yield "jpeg gray", saved("JPEG", gray)
    yield "jpeg CMYK", saved("JPEG", Image.fromarray(pixels).convert("CMYK"))
    yield "jpeg neither JFIF nor Adobe", jpeg_with(jfif=False)
    yield "mpo", saved("MPO", save_all=True, append_images=[Image.new("RGB", (24, 16))])
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0")
    yield "jpeg Adobe says RGB, its components YCC", jpeg_with(adobe, jfif=False)


def damaged() -> Iterator[tuple[str, bytes]]:
    good = saved("JPEG", quality=95)
    yield "empty", b""
    yield "text", b"this is no picture"
    for at in (2, 20):
        for num_bytes in (1, 3, 100):
            yield f"jpeg {num_bytes} stray bytes at {at}", good[:at] + bytes(num_bytes) + good[at:]
    yield "jpeg fill bytes", good[:20] + b"\xff" * 5 + good[20:]
    yield "jpeg with a tail", good + b"more" * 100
    yield "jpeg without its end", good[:-2]
    yield "jpeg of one scan's half", good[: len(good) // 2]
    for at in (len(good) - 20, len(good) - 100, len(good) - 200):
        yield f"jpeg damaged at {at}", good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]
    yield "jpeg with a marker in its pixels", good[:-100] + b"\xff\xd3" + good[-100:]
    yield "jpeg without Huffman tables", good[:2] + b"".join(good.partition(b"\xff\xda")[1:])
    for format in ("PNG", "BMP", "TIFF", "WEBP"):
        content = saved(format)
        yield f"{format} cut off", content[: len(content) // 2]
        yield f"{format} with a tail", content + b"more"
        yield f"{format} of its first bytes", content[:12]


def odd_pictures() -> dict[str, bytes]:
    """Name -> file."""
    return dict([*turned_jpegs(), *turned_others(), *layouts(), *damaged()])
