"""The fast check: it takes plain files by their headers, and only files that the full check would store as they are."""

import io
import re
from collections.abc import Callable

import numpy as np
import pytest
from odd_formats import other_pictures
from odd_pictures import (
    bmp,
    chunk,
    exif,
    jpeg_with,
    odd_pictures,
    picture,
    png,
    saved,
    segment,
    tiff_header,
    xmp_segment,
)
from PIL import Image

from cifar_dist.data.sources.fast_check import plain_file
from cifar_dist.data.sources.picture import Rules, Shown, show

FULL, FAST = Rules(), Rules(check="fast")


def fast(content: bytes) -> bool:
    return plain_file(content) is not None


PLAIN = {
    **{f"jpeg {s} {p}": saved("JPEG", subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)},
    **{f"jpeg {w} x {h}": saved("JPEG", picture(w, h)) for w, h in ((1, 1), (3, 5), (1, 40), (17, 31), (100, 75))},
    "jpeg optimized": saved("JPEG", optimize=True, quality=95),
    "jpeg with a profile": saved("JPEG", icc_profile=b"x" * 99999),
    "jpeg upright by EXIF": jpeg_with(exif(1)),
    "jpeg upright by little-endian EXIF": jpeg_with(exif(1, "SHORT", "<")),
    "jpeg upright by XMP": jpeg_with(xmp_segment(1)),
    "jpeg upright by an element of XMP": jpeg_with(xmp_segment(1, False)),
    "jpeg Adobe YCbCr": jpeg_with(segment(0xEE, b"Adobe\0\x64\0\0\0\0\1")),
    "jpeg comment": jpeg_with(segment(0xFE, b"hello")),
    "png": saved("PNG"),
    "png with a text": png(picture(), 8, chunk(b"tEXt", b"Software\0hand")),
    "webp": saved("WEBP"),
    "bmp": saved("BMP"),
    "bmp top-down": bmp(24, picture()[..., ::-1].tobytes(), height=-16),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_are_taken_fast_and_only_whole(name: str):
    content = PLAIN[name]
    shown, full = show(content, name, FAST), show(content, name, FULL)
    assert shown == full._replace(pixels=None) == Shown(None, full.encoding, full.height, full.width)
    cuts = {*range(len(content) - 40, len(content)), *range(0, len(content), 7), 1, 2, 3, 4} & {*range(len(content))}
    assert [cut for cut in cuts if fast(content[:cut])] == []
    assert not fast(content + b"\0")
    assert not fast(content + content)


def with_frame(marker: int, at: int, value: int) -> bytes:
    """A JPEG with another kind of frame header, and another byte `at` behind its length."""
    content = bytearray(saved("JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 1] = marker
    content[start + 4 + at] = value
    return bytes(content)


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) >= 1
    return content.replace(old, new, 1)


JPEG = saved("JPEG")
NOT_PLAIN: dict[str, Callable[[], bytes]] = {
    "turned by EXIF": lambda: jpeg_with(exif(6)),
    "orientation of an odd type": lambda: jpeg_with(exif(1, "LONG")),
    "two EXIF": lambda: jpeg_with(exif(1), exif(1)),
    "turned by XMP": lambda: jpeg_with(xmp_segment(6)),
    "turned by an element of XMP": lambda: jpeg_with(xmp_segment(6, False)),
    "EXIF cut off": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + tiff_header(1)[:16])),
    "EXIF padded": lambda: jpeg_with(segment(0xE1, b"Exif\0\xff" + tiff_header(1))),
    "several pictures": lambda: saved("MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "RGB by Adobe": lambda: jpeg_with(segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"), jfif=False),
    "RGB by its components": lambda: saved("JPEG", keep_rgb=True),
    "gray": lambda: saved("JPEG", picture()[..., 0]),
    "CMYK": lambda: saved("JPEG", Image.fromarray(picture()).convert("CMYK")),
    "restarts": lambda: saved("JPEG", restart_marker_blocks=1),
    "extended frame": lambda: with_frame(0xC1, 0, 8),
    "12 bits": lambda: with_frame(0xC0, 0, 12),
    "no height": lambda: with_frame(0xC0, 2, 0),
    "odd sampling": lambda: with_frame(0xC0, 7, 0x41),
    "stray bytes": lambda: JPEG[:20] + b"\0" + JPEG[20:],
    "fill bytes": lambda: JPEG[:20] + b"\xff" + JPEG[20:],
    "a marker in its pixels": lambda: JPEG[:-100] + b"\xff\xd3" + JPEG[-100:],
    "two pictures in a row": lambda: JPEG + JPEG,
    "an end within its pixels": lambda: JPEG[:-50] + b"\xff\xd9" + JPEG[-50:],
    "no Huffman tables": lambda: JPEG[:2] + b"".join(JPEG.partition(b"\xff\xda")[1:]),
    "a damaged Huffman table": lambda: changed(JPEG, b"\xff\xc4\0\x1f\0\0", b"\xff\xc4\0\x1f\0\1"),
    "two frames": lambda: changed(JPEG, b"\xff\xc0", JPEG[(at := JPEG.index(b"\xff\xc0")) : at + 19] + b"\xff\xc0"),
    "png of 16 bits": lambda: png(picture().astype(np.uint16), 16),
    "png with a wrong checksum": lambda: changed(png(picture()), b"IDATx", b"IDATy"),
    "png with alpha": lambda: png(np.dstack([picture(), picture()[..., :1]]), colour=6),
    "png with a clear colour": lambda: png(picture(), 8, chunk(b"tRNS", bytes(6))),
    "png with EXIF": lambda: png(picture(), 8, chunk(b"eXIf", tiff_header(6))),
    "png with EXIF as a text": lambda: png(picture(), 8, chunk(b"tEXt", b"Raw profile type exif\0x")),
    "png with XMP": lambda: png(picture(), 8, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0x")),
    "png animated": lambda: saved("PNG", save_all=True, append_images=[Image.new("RGB", (24, 16), "red")]),
    "png without pixels": lambda: re.sub(rb"....IDAT.*(?=....IEND)", b"", png(picture()), flags=re.DOTALL),
    "webp with EXIF": lambda: saved("WEBP", exif=tiff_header(6)),
    "webp without loss": lambda: saved("WEBP", lossless=True),
    "webp with alpha": lambda: saved("WEBP", Image.fromarray(np.dstack([picture(), picture()[..., :1]]))),
    "webp of another length": lambda: changed(saved("WEBP"), b"RIFF", b"RIFF\2\0\0\0"),
    "bmp of 32 bits": lambda: bmp(32, bytes(24 * 16 * 4)),
    "bmp with too few pixels": lambda: bmp(24, bytes(24 * 16 * 3 - 1)),
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_not_plain_goes_the_full_way(name: str):
    assert not fast(NOT_PLAIN[name]())


def test_no_odd_picture_is_taken_fast_that_the_full_check_would_store_otherwise():
    """Damage within the compressed pixels is the one thing that the fast check cannot see."""
    files = odd_pictures() | other_pictures()
    taken = {name: content for name, content in files.items() if fast(content)}
    for name, content in taken.items():
        full = show(content, name, FULL)
        assert show(content, name, FAST) == full._replace(pixels=None), name
        upright = np.asarray(Image.open(io.BytesIO(content)))
        assert not full.is_odd
        assert np.array_equal(full.pixels, upright), name
    assert 40 < len(taken) < 140
    assert not {name for name in taken if "cut off" in name or "tail" in name or "bytes" in name}
