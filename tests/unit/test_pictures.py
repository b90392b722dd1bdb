"""How pictures are read: transparency, floating-point values, sizes, and kinds that are not read."""

import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from odd_formats import floats, other_pictures, transparent
from odd_pictures import bmp, chunk, picture, png, saved
from PIL import Image, PngImagePlugin

from cifar_dist.data.sources.picture import Rules, show
from cifar_dist.errors import UserError

ROOT = Path(__file__).parents[2]
FULL, FAST = Rules(), Rules(check="fast")
TRANSPARENT = {name: rest for name, *rest in transparent()}
FLOATS = {name: rest for name, *rest in floats()}


def refusal(content: bytes, where: str = "a/b.png", rules: Rules = FULL) -> str:
    """The sentence that refuses a file, which names it."""
    with pytest.raises(UserError) as caught:
        show(content, where, rules)
    assert str(caught.value).startswith(f"{where} ")
    return str(caught.value)


# Transparency


@pytest.mark.parametrize("alpha", ["drop", "white", "black"])
@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_lie_on_the_ground_that_is_asked_for(name: str, alpha: str):
    content, rgb, opacity = TRANSPARENT[name]
    shown = show(content, name, Rules(alpha=alpha))
    share = opacity[..., None] / 255
    wanted = rgb if alpha == "drop" else np.rint(rgb * share + (255 if alpha == "white" else 0) * (1 - share))
    assert np.abs(shown.pixels - wanted).max() <= 0.5
    assert shown.has_alpha
    assert shown.is_odd or alpha == "drop"


@pytest.mark.parametrize("alpha", ["white", "black"])
def test_what_is_opaque_is_as_without_the_rule(alpha: str):
    opaque = {
        "png RGBA": png(np.dstack([picture(), np.full((16, 24), 255)]), colour=6),
        "png RGB, the clear colour is not in it": png(picture(), 8, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
        "png palette of opaque entries": saved("PNG", Image.fromarray(picture()).quantize(8), transparency=b"\xff" * 8),
        "a text called transparency": png(picture(), 8, chunk(b"tEXt", b"transparency\0yes")),
        "jpeg": saved("JPEG"),
        "gif": saved("GIF"),
    }
    for name, content in opaque.items():
        plain, ruled = show(content, name, FULL), show(content, name, Rules(alpha=alpha))
        assert not ruled.has_alpha, name
        assert np.array_equal(plain.pixels, ruled.pixels)
        assert plain._replace(pixels=None) == ruled._replace(pixels=None)


def test_a_text_called_transparency_does_not_hurt_any_mode():
    text = chunk(b"tEXt", b"transparency\0yes")
    palette = chunk(b"PLTE", bytes(range(256)) * 3)
    for content in (
        png(picture(), 8, text),
        png(picture()[..., 0], 8, text, colour=0),
        png(picture()[..., 0], 8, palette, text, colour=3),
    ):
        assert not show(content, "x", Rules(alpha="white")).has_alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_premultiplied_colours_are_divided_again(mode: str):
    pixels, fifth = picture() // 5, np.full((16, 24), 51, np.uint8)
    planes = np.dstack([pixels if mode == "RGBA" else pixels[..., 0], fifth])
    kind = struct.pack("<HHII", 338, 3, 1, 2)  # extra samples: 2 is plain alpha, 1 is multiplied into the colours
    content = saved("TIFF", Image.fromarray(planes, mode))
    assert content.count(kind) == 1
    content = content.replace(kind, struct.pack("<HHII", 338, 3, 1, 1))
    wanted = pixels.astype(int) if mode == "RGBA" else pixels[..., :1].astype(int)
    for alpha, share in (("drop", 5), ("black", 1)):
        assert np.abs(show(content, "x", Rules(alpha=alpha)).pixels - wanted * share).max() <= 1


# Values


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_values_are_scaled_by_their_range(name: str):
    content, gray = FLOATS[name]
    if gray is None:
        assert "floating-point numbers from" in refusal(content)
        return
    shown = show(content, name, FULL)
    assert np.array_equal(shown.pixels, np.stack([gray] * 3, -1))
    assert (shown.largest == 65535) == (name == "tiff float words")
    assert shown.is_odd


def test_integers_that_do_not_fit_16_bits_are_refused():
    for value in (-1, 65536):
        content = saved("TIFF", np.full((4, 4), value, np.int32))
        assert f"integers from {value}" in refusal(content)
    assert show(saved("TIFF", np.full((4, 4), 65535, np.int32)), "x", FULL).pixels.min() == 255


def test_16_bit_gray_is_the_same_in_each_byte_order_and_polarity():
    other = other_pictures()
    gray = np.stack([picture()[..., 0]] * 3, -1)
    for name in (
        "tiff 16-bit gray",
        "tiff 16-bit gray big-endian",
        "tiff 32-bit gray",
        "ppm I;16",
        "jpeg 2000 16-bit gray",
    ):
        shown = show(other[name], name, FULL)
        assert np.array_equal(shown.pixels, gray), name
        assert shown.largest == int(gray.max()) * 257
    assert np.array_equal(show(other["tiff 16-bit gray, 0 is white"], "x", FULL).pixels, 255 - gray)


def test_pixels_of_plain_ppm_and_others_are_those_that_are_written():
    other = other_pictures()

    def pixels(name: str) -> list:
        return show(other[name], name, FULL).pixels.tolist()

    assert pixels("ppm plain") == [[[255, 0, 119], [17, 34, 51]]]
    assert pixels("pgm plain") == [[[0] * 3, [50] * 3], [[100] * 3, [255] * 3]]
    assert pixels("pbm plain") == [[[0] * 3, [255] * 3, [0] * 3]]
    for name in ("ppm RGB", "jpeg 2000 RGB", "jpeg 2000 codestream"):
        assert pixels(name) == picture().tolist()
    for name in ("gif animated", "avif animated"):
        assert np.abs(np.array(pixels(name)) - picture()).mean() < 12  # the first picture, not the red one


# Kinds that are not read


def box(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + bytes(99)


UNREAD = {
    "heic": (box(b"heic"), "HEIC"),
    "heif": (box(b"mif1"), "HEIC"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "psd": (b"8BPS\0\1" + bytes(99), "Photoshop"),
    "cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "camera's raw"),
    "cr3": (box(b"crx "), "camera's raw"),
    "nef": (saved("TIFF"), "camera's raw"),
    "dng": (saved("TIFF"), "camera's raw"),
    "raf": (b"FUJIFILMCCD-RAW " + bytes(99), "camera's raw"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "ico": (b"\0\0\1\0\1\0" + bytes(99), "ICO"),
    "jxl": (b"\xff\x0a" + bytes(99), "JPEG XL"),
    "tga": (bytes((0, 0, 2)) + bytes(99), "TGA"),
    "mp4": (box(b"isom"), "video"),
    "zip": (b"PK\3\4" + bytes(99), "unpack"),
    "html": (b"\n<!DOCTYPE html><html>not found</html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("suffix", UNREAD)
@pytest.mark.parametrize("check", ["full", "fast"])
def test_a_kind_that_is_not_read_is_named(suffix: str, check: str):
    content, words = UNREAD[suffix]
    said = refusal(content, f"some/file.{suffix}", Rules(check=check))
    assert words in said
    assert "; " in said  # what to do


def test_the_content_is_believed_more_than_the_suffix():
    assert show(saved("JPEG"), "x.heic", FULL).encoding == "JPEG"
    assert "HEIC" in refusal(box(b"heic"), "x.jpg")
    for content in (b"hello", b"\0\0\2\0" + bytes(99)):
        assert "no image of a kind that is read: JPEG, PNG" in refusal(content, "x.jpg")


@pytest.mark.parametrize("tag", [{254: 1}, {50706: b"\1\4\0\0"}])  # a reduced copy; the version of DNG
def test_a_tiff_that_begins_with_a_preview_is_refused(tag: dict):
    assert "preview" in refusal(saved("TIFF", tiffinfo=tag), "x.tif")


# Sizes

HUGE = 60_000


def claims() -> dict[str, bytes]:
    """Short files whose headers claim 60,000 x 60,000 pixels (WebP: 16,384 x 16,384)."""
    wide = struct.pack(">HH", HUGE, HUGE)
    jpeg = saved("JPEG")
    start = jpeg.index(b"\xff\xc0")
    tiff = saved("TIFF", tiffinfo={})
    for size in (24, 16):
        tag = struct.pack("<HHII", 256 if size == 24 else 257, 4, 1, size)
        assert tag in tiff
        tiff = tiff.replace(tag, struct.pack("<HHII", 256 if size == 24 else 257, 4, 1, HUGE))
    animated = saved("WEBP", save_all=True, append_images=[Image.new("RGB", (24, 16))])
    gif = saved("GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))], disposal=2, optimize=False)
    frame = gif.index(b"\x2c\0\0\0\0\x18\0\x10\0")
    little = struct.pack("<HH", HUGE, HUGE)
    jpeg_2000 = saved("JPEG2000", no_jp2=True)
    return {
        "PNG": png(picture()).replace(struct.pack(">II", 24, 16), struct.pack(">II", HUGE, HUGE)),
        "JPEG": jpeg[: start + 5] + wide + jpeg[start + 9 :],
        "GIF": gif[:6] + little + gif[10 : frame + 5] + little + gif[frame + 9 :],
        "BMP": bmp(24, bytes(99)).replace(struct.pack("<ii", 24, 16), struct.pack("<ii", HUGE, HUGE)),
        "TIFF": tiff,
        "WEBP": animated[:24] + b"\xff\x3f\0" * 2 + animated[30:],
        "JPEG2000": jpeg_2000.replace(struct.pack(">II", 24, 16), struct.pack(">II", HUGE, HUGE), 1),
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
    }


def corrected(content: bytes) -> bytes:
    """A PNG with the right checksum of its header."""
    return content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]


@pytest.mark.parametrize("check", ["full", "fast"])
def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken(tmp_path: Path, check: str):
    for name, content in claims().items():
        (tmp_path / name).write_bytes(corrected(content) if name == "PNG" else content)
    program = f"""
import resource, sys
from pathlib import Path
from cifar_dist.data.sources.picture import Rules, show
from cifar_dist.errors import UserError
show({saved("PNG")!r}, "x", Rules())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        show(path.read_bytes(), path.name, Rules(check={check!r}, max_pixels=100_000_000))
    except UserError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    *said, mebibytes = ran.stdout.splitlines()
    assert [line.partition(" ")[0] for line in said] == sorted(claims())
    assert all(re.search(r"has [0-9 x]+ pixels, more than --max-pixels 100000000", line) for line in said), said
    assert int(mebibytes) < 60
    assert ran.stderr == ""  # no warning of Pillow's


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("rules", [Rules(max_pixels=384), Rules(max_pixels=384, check="fast")])
def test_pictures_of_up_to_max_pixels_are_read_and_no_larger_ones(format: str, rules: Rules, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit, which counts no more
    assert show(saved(format), "x", rules)[2:4] == (16, 24)
    smaller = Rules(max_pixels=383, check=rules.check)
    assert refusal(saved(format), "x", smaller).startswith("x has 24 x 16 pixels, more than --max-pixels 383; ")
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_large_tiff_is_read_above_pillows_limit(monkeypatch):
    """Pillow checks the size of a TIFF once more when it decodes it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    content = saved("TIFF", Image.new("1", (5000, 5000), 1), compression="group4")
    assert show(content, "x", FULL).pixels.shape == (5000, 5000, 3)


def test_threads_with_other_limits_do_not_disturb_each_other():
    before = Image.MAX_IMAGE_PIXELS
    contents = [saved("TIFF"), saved("PNG"), saved("GIF")]

    def read(i: int) -> bool:
        try:
            show(contents[i % 3], "x", Rules(max_pixels=384 if i % 2 else 383))
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(600))) == [i % 2 == 1 for i in range(600)]
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_bomb_in_the_metadata_is_refused_with_a_sentence():
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * (1 << 26), zip=True)
    assert "texts or its colour profile are too large" in refusal(saved("PNG", pnginfo=text))
    many = png(picture(), 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (1 << 20)))] * 70)
    assert "texts or its colour profile are too large" in refusal(many)
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    assert "too large" in refusal(png(picture(), 8, profile))
