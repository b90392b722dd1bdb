"""Pictures of Pillow's tests, scikit-image and imageio: training sees what Pillow shows, or a sentence refuses."""

import hashlib
import io
import random
import tarfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import prepared
import pytest
from PIL import Image, ImageOps

from cifar_dist.data import check, sources
from cifar_dist.data.sources.fast_check import plain_file
from cifar_dist.data.sources.names import kind_of
from cifar_dist.data.sources.picture import Rules, Shown, show
from cifar_dist.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "cifar_dist-tests"
MORE = {  # source distributions, where that of Pillow comes from, with their SHA-256
    "a1/b4/2528bb43c67d48053a7a649a9666432dc307d66ba02e3a6d5c40f46655df/"
    "scikit_image-0.26.0.tar.gz": "f5f970ab04efad85c24714321fcc91613fcb64ef2a892a13167df2f3e59199fa",
    "f3/cd/69e4ac55b6dafdd2b5f32075236841a3945dea7323d0232d80f28c37cea8/"
    "imageio-2.38.1.tar.gz": "6769f1f01c4dd46448307863a787c9a22fa4dbe11c0c88f525c6e410fdfd7983",
}
GROUNDS = {"white": 255, "black": 0}
# Files of a kind that is read, and whole, though they look damaged or are so in Pillow's eyes.
STRANGE = {"junk_jpeg_header.jpg", "photoshop-200dpi-broken.jpg", "tiff_strip_planar_16bit_RGB.tiff", "badplanes.bmp"}
REFUSED = {  # of a kind that is read, but damaged, cut off, or with values out of range
    *("10ct_32bit_128.tiff", "truncated_jpeg.jpg", "truncated_image.png", "decompression_bomb.gif", "reallybig.bmp"),
    *("png_decompression_dos.png", "hopper_webp.tif", "broken_data_stream.png", "zero_width.gif", "shortfile.bmp"),
}


def download(url: str, sha256: str) -> bytes:
    """The file of the lock, from the cache or the network; skips the test without a network."""
    path = CACHE / url.rpartition("/")[2]
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except (urllib.error.URLError, OSError) as error:
            pytest.skip(f"{url} could not be downloaded: {error}")
        assert hashlib.sha256(content).hexdigest() == sha256, f"{url} is not the file of uv.lock"
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{random.getrandbits(32):x}")
        part.write_bytes(content)
        part.replace(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Name -> file of the source distributions of Pillow, as uv.lock names it, scikit-image and imageio."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (source,) = [package["sdist"] for package in packages if package["name"] == "pillow"]
    found = members(download(source["url"], source["hash"].removeprefix("sha256:")), "/Tests/images/")
    index = source["url"].partition("/packages/")[0]
    for place, sha256 in MORE.items():
        name = place.rpartition("/")[2].rpartition("-")[0]
        more = members(download(f"{index}/packages/{place}", sha256), "/")
        found |= {f"{name}/{path}": content for path, content in more.items() if kind_of(path) == ""}
    return found


def members(content: bytes, folder: str) -> dict[str, bytes]:
    """The files below a folder of a source distribution, by their names in it."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = [member for member in archive.getmembers() if member.isfile() and folder in member.name]
        return {m.name.partition(folder)[2]: archive.extractfile(m).read() for m in files}


def seen(content: bytes, name: str, rules: Rules) -> Shown | str:
    """What is shown of a file, or the sentence that refuses it. Anything else fails the test."""
    try:
        return show(content, name, rules)
    except UserError as error:
        said = str(error)
    assert said.startswith(f"{name} ")
    return said


@pytest.fixture(scope="module")
def shown(files) -> dict[str, Shown | str]:
    return {name: seen(content, name, Rules()) for name, content in files.items()}


def upright(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """RGB, uint8 [H, W, 3], and alpha, uint8 [H, W], by Pillow alone."""
    file = Image.open(io.BytesIO(content))
    is_inverted = file.format == "TIFF" and file.tag_v2.get(262) == 0
    file.load()
    turned = ImageOps.exif_transpose(file)
    image = turned if turned is not None else file
    opaque = np.full(image.size[::-1], 255, np.uint8)
    gray = np.asarray(image).astype(float)
    if image.mode == "F":
        scale = 255 if gray.max() <= 1 else 1 if gray.max() <= 255 else 1 / 257
        gray = np.rint(np.asarray(image) * scale)
    elif image.mode.startswith("I"):
        gray = gray // 257
    if image.mode == "F" or image.mode.startswith("I"):
        clear = image.info.get("transparency")
        gray = 255 - gray if is_inverted else gray
        alpha = opaque if clear is None else np.where(np.asarray(image) == clear, 0, 255)
        return np.stack([gray] * 3, -1).astype(np.uint8), alpha.astype(np.uint8)
    image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
    alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else opaque
    image.info.pop("transparency", None) if image.mode != "P" else None
    return np.asarray((image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")), alpha


def test_most_files_are_read(shown):
    read = {name.rpartition("/")[2] for name, found in shown.items() if isinstance(found, Shown)}
    assert len(read) > 650
    assert read >= STRANGE
    refused = {name.rpartition("/")[2]: said for name, said in shown.items() if isinstance(said, str)}
    assert refused.keys() >= REFUSED
    kinds = {found.encoding for found in shown.values() if isinstance(found, Shown)}
    assert kinds == {"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM"}


def test_each_file_is_shown_as_pillow_shows_it(files, shown):
    wrong = []
    for name, found in shown.items():
        if isinstance(found, Shown):
            rgb, alpha = upright(files[name])
            same = np.array_equal(found.pixels, rgb) and (found.height, found.width) == rgb.shape[:2]
            wrong += [name] * (not same or found.has_alpha != bool((alpha < 255).any()))
    assert wrong == []


@pytest.mark.parametrize("ground", GROUNDS)
def test_each_transparent_file_is_laid_on_the_ground(files, shown, ground: str):
    names = [name for name, found in shown.items() if isinstance(found, Shown) and found.has_alpha]
    assert len(names) > 50
    for name in names:
        rgb, alpha = upright(files[name])
        share = alpha[..., None] / 255
        pixels = show(files[name], name, Rules(alpha=ground)).pixels
        assert np.abs(pixels - (rgb * share + GROUNDS[ground] * (1 - share))).max() <= 0.5001, name


def test_what_is_stored_decodes_in_dali_to_what_pillow_shows(files, shown):
    items = [sources.Item(name, 0, lambda content=content: content) for name, content in files.items()]
    rows = prepared.rows(sources.Source.of("test", ["a"], {"train": items}), skip_bad=True)
    assert {row.path for row in rows} == {name for name, found in shown.items() if isinstance(found, Shown)}
    pipe, wrong, kept = check.decode_pipeline(1, 1), [], set()
    for row in rows:
        pipe.feed_input("images", [np.frombuffer(row.encoded, np.uint8)])
        pixels = np.array(pipe.run()[0].at(0))
        found = shown[row.path]
        wrong += [row.path] * (not np.array_equal(pixels, found.pixels) or pixels.shape[:2] != (row.height, row.width))
        kept |= {row.path} if row.encoded == files[row.path] else set()
    assert wrong == []
    assert len(kept) > 250
    taken = {name for name, found in shown.items() if plain_file(files[name])}
    assert taken <= kept  # what the fast check takes is what the full check keeps
    assert len(taken) > 250


def cuts(length: int) -> Iterator[int]:
    yield from {length - 1, length - 2, length - 10, length * 9 // 10, length * 3 // 4, length // 2, length // 4}


def test_a_file_that_was_cut_off_is_refused_or_shown_as_the_whole(files, shown):
    """A file of numbers as text may end within a number, which nobody can see."""
    small = {name for name, found in shown.items() if isinstance(found, Shown) and len(files[name]) < 100_000}
    names = [
        name for name in sorted(small) if "plain" not in name and not (name.endswith(".png") and hash_of(name) % 9)
    ]
    assert len(names) > 200
    wrong, num_refused = [], 0
    for name in names:
        for length in cuts(len(files[name])):
            part = files[name][: max(length, 1)]
            assert not plain_file(part)
            found = seen(part, name, Rules())
            num_refused += isinstance(found, str)
            wrong += [(name, length)] * (
                isinstance(found, Shown) and not np.array_equal(found.pixels, shown[name].pixels)
            )
    assert wrong == []
    assert num_refused > 3 * len(names)


def hash_of(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)
