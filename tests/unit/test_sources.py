"""Sources: each kind of image becomes RGB or is refused by its path; CIFAR-10, shapes. Layouts: test_layouts.py."""

import hashlib
import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from odd_pictures import png
from PIL import Image, ImageOps
from prepared import read, rows, write_tree
from torchvision.datasets import CIFAR10

from cifar_dist.data import sources
from cifar_dist.data.making import Row
from cifar_dist.data.pipeline import decode
from cifar_dist.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A smooth picture without symmetry, in any of Pillow's modes."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    pixels = np.stack([200 * x + 20, 180 * y + 30, 120 * x * y + 60], -1).astype(np.uint8)
    if mode == "I;16":  # the red channel
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray((100 + 155 * x).astype(np.uint8)))
    return image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def row_of(content: bytes | np.ndarray, path: str = "picture", label: int = 0) -> Row:
    """What is stored of a file."""
    items = [sources.Item(path, label, lambda: content)]
    (row,) = rows(sources.Source.of("test", ["a"], {"train": items}))
    return row


def folder(root: Path | str | None, **options: Any) -> sources.Source:
    return sources.find_source("folder", str(root) if root else None, **options)


def decoded(content: bytes) -> np.ndarray:
    """uint8 [H, W, 3] as the training job sees it."""
    return next(decode([[np.frombuffer(content, np.uint8)]], 1, 1))[0]


PNG, JPEG = encoded(picture(), "PNG"), encoded(picture(), "JPEG")


# Images that are kept or converted


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_rgb_files_are_kept_byte_for_byte(format: str):
    content = encoded(picture(), format)
    row = row_of(content)
    assert (row.encoded, row.encoding, row.height, row.width) == (content, format, 16, 24)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.abs(decoded(content).astype(int) - expected).max() <= 2  # JPEG and WebP decoders may round differently


# L is grayscale, LA and RGBA have alpha, P is a palette, I;16 is 16-bit grayscale.
OTHER_MODES = {
    "JPEG": ["L", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGBA", "I;16"],
    "WEBP": ["RGBA"],
    "BMP": ["1", "L", "P"],
    "TIFF": ["L", "LA", "P", "RGBA", "CMYK", "I;16"],
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format in OTHER_MODES for mode in OTHER_MODES[format]])
def test_other_modes_become_rgb(mode: str, format: str):
    row = row_of(encoded(picture(mode), format))
    assert row.encoding == "PNG"
    with Image.open(io.BytesIO(row.encoded)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (24, 16))
        got = np.asarray(image).astype(int)
    if mode == "I;16":
        expected = np.asarray(picture())[..., :1].repeat(3, -1)
    else:
        expected = np.asarray(picture(mode.removesuffix("A")).convert("RGB"))
    assert np.abs(got - expected).max() <= (24 if format in ("JPEG", "WEBP") else 0)  # these two are lossy


def test_16_bit_rgb_png_reaches_training_as_8_bit():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 4, 3))
    body = zlib.compress(b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 5, 16, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    assert np.abs(decoded(row_of(content).encoded) - pixels / 257).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([250, 10, 20, 30, 240, 50])
    image.putpixel((1, 0), 1)
    row = row_of(encoded(image, "PNG", transparency=0))
    assert decoded(row.encoded).tolist() == [[[250, 10, 20], [30, 240, 50]]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_applied_once(mode: str, format: str, orientation: int):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(picture(mode), format, exif=exif.tobytes())
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")).astype(int)
    row = row_of(content)
    got = decoded(row.encoded)
    assert got.shape == upright.shape
    assert (row.height, row.width) == upright.shape[:2]
    assert np.abs(got - upright).max() <= 2


def test_of_several_pages_the_first_is_kept():
    row = row_of(encoded(picture(), "TIFF", save_all=True, append_images=[Image.new("RGB", (24, 16))]))
    assert row.encoding == "PNG"
    assert (decoded(row.encoded) == np.asarray(picture())).all()


def test_raw_pixels_become_lossless_png():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    row = row_of(pixels, "x.png", 4)
    assert (row.path, row.label, row.encoding, row.height, row.width) == ("x.png", 4, "PNG", 7, 9)
    assert (np.asarray(Image.open(io.BytesIO(row.encoded))) == pixels).all()


# Images that are refused


def damaged_png() -> bytes:
    """One byte in the middle of the pixels is changed: decoders may not notice, the checksum does."""
    return PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 0xFF]) + PNG[len(PNG) // 2 + 1 :]


BAD_FILES = {
    "empty.png": (b"", "zero bytes"),
    "text.jpg": (b"this is no picture\n" * 20, "no image of a kind that is read"),
    "damaged.png": (damaged_png(), "not a readable image"),
    "damaged.jpg": (JPEG[:2] + bytes(len(JPEG) - 2), "not a readable image"),
    "truncated.jpg": (JPEG[: len(JPEG) * 2 // 3], "truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "not a readable image"),
    "no_end.png": (PNG[:-14], "not a readable image"),  # all pixels are there, their checksum and the end are not
    "truncated.bmp": (encoded(picture(), "BMP")[:-50], "truncated"),
    "truncated.tiff": (encoded(picture(), "TIFF")[:-50], "not a readable image"),
    "truncated.webp": (encoded(picture(), "WEBP")[:-20], "not a readable image"),
    "picture.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_by_its_path(tmp_path: Path, name: str):
    content, reason = BAD_FILES[name]
    root = write_tree(
        tmp_path,
        {
            "train/a/1.png": PNG,
            f"train/a/{name}": content,
            "train/b/1.png": PNG,
            "test/a/1.png": PNG,
            "test/b/1.png": PNG,
        },
    )
    with pytest.raises(UserError) as caught:
        rows(folder(root))
    message = str(caught.value)
    assert str(root / "train" / "a" / name) in message
    assert reason in message
    assert "--skip-bad" in message
    assert "\n" not in message


def test_skip_bad_leaves_out_and_lists_the_bad_files_only(tmp_path: Path):
    good = {f"{split}/{c}/good.png": PNG for split in ("train", "test") for c in "ab"}
    root = write_tree(tmp_path, good | {f"train/b/{name}": content for name, (content, _) in BAD_FILES.items()})
    found, about = read(folder(root), skip_bad=True)
    assert [row.path for row in found] == ["train/a/good.png", "train/b/good.png"]
    assert {bad["path"] for bad in about.bad} == {f"train/b/{name}" for name in BAD_FILES}
    assert all(str(root / bad["path"]) in bad["reason"] and bad["label"] == 1 for bad in about.bad)


def test_a_file_that_is_gone_when_it_is_read_is_named(tmp_path: Path):
    root = write_tree(tmp_path, {f"train/{c}/{i}.png": PNG for c in "ab" for i in range(2)})
    source = folder(root)
    gone = root / source.splits["train"]["name"][0].as_py()
    gone.unlink()
    with pytest.raises(UserError, match=f"{gone} cannot be read: No such file"):
        rows(source)


# CIFAR-10


def test_cifar10_keeps_every_pixel_and_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision reads files in CIFAR-10's own format, only smaller, with checksums to match."""
    random = np.random.default_rng(0)
    root = tmp_path / CIFAR10.base_folder
    root.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (root / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        return write(
            name, {"data": random.integers(0, 256, (4, 3072), np.uint8), "labels": random.integers(0, 10, 4).tolist()}
        )

    monkeypatch.setattr(CIFAR10, "train_list", [batch("data_batch_1"), batch("data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    names = ["airplane", *"bcdefghij"]
    name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})

    source = sources.cifar10(str(tmp_path))
    assert source.class_names == names
    for split, files in (("train", ["data_batch_1", "data_batch_2"]), ("test", ["test_batch"])):
        batches = [pickle.loads((root / file).read_bytes()) for file in files]  # noqa: S301 - written above
        planes = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32)
        stored = rows(source, split)
        assert [row.label for row in stored] == [label for b in batches for label in b["labels"]]
        assert {row.encoding for row in stored} == {"PNG"}
        got = np.stack([np.asarray(Image.open(io.BytesIO(row.encoded))) for row in stored])
        assert (got == planes.transpose(0, 2, 3, 1)).all()


def test_cifar10_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):  # nothing listens on port 9
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="could not be downloaded") as caught:
        sources.cifar10(str(tmp_path))
    for advice in (str(tmp_path), CIFAR10.filename, "--path", "--source folder", "--source shapes"):
        assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cifar10_does_not_make_a_mistyped_folder(tmp_path: Path):
    with pytest.raises(UserError, match="typo does not exist"):
        sources.cifar10(str(tmp_path / "typo"))


# Shapes


def test_shapes_follow_the_seed():
    def drawn(seed: int) -> dict[str, list[Row]]:
        source = sources.shapes(40, 20, seed)
        return {split: rows(source, split) for split in ("train", "test")}

    first = drawn(seed=0)
    assert drawn(seed=0) == first
    contents = [row.encoded for part in (first["train"], first["test"], drawn(seed=1)["train"]) for row in part]
    assert len(set(contents)) == 100  # no picture twice: not within a split, between splits or between seeds


def test_shapes_are_balanced_32_px_rgb():
    source = sources.shapes(50, 20)
    stored = rows(source)
    assert np.bincount([row.label for row in stored]).tolist() == [5] * 10
    assert len(set(source.class_names)) == 10
    assert {(row.height, row.width, row.encoding) for row in stored} == {(32, 32, "PNG")}
    assert all(Image.open(io.BytesIO(row.encoded)).mode == "RGB" for row in stored)


@pytest.mark.parametrize("label", range(10))
def test_each_shape_stands_out_from_its_ground(label: int):
    pixels = sources.draw_shape(label, (0, 0, label)).astype(int)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    share = (np.abs(pixels - np.median(corners, 0)).min(-1) > 40).mean()
    assert 0.02 < share < 0.8


@pytest.mark.parametrize(("num_train", "num_test"), [(19, 20), (20, 19), (0, 0), (-5, 100)])
def test_too_few_shapes_are_refused(num_train: int, num_test: int):
    with pytest.raises(UserError, match="must be 20 or more"):
        sources.shapes(num_train, num_test)


@pytest.mark.parametrize(("name", "save"), [("a.mpo", {"format": "MPO"}), ("b.webp", {"lossless": True})])
def test_files_that_the_decoder_may_not_read_become_png(name: str, save: dict, tmp_path: Path) -> None:
    """What cameras write: two pictures in one JPEG, and WebP with EXIF."""
    image = Image.fromarray(np.arange(15 * 20 * 3, dtype=np.uint8).reshape(15, 20, 3))
    exif = Image.Exif()
    exif[0x010E] = "x"
    more = {"save_all": True, "append_images": [image]} if "format" in save else {"exif": exif}
    image.save(tmp_path / name, **save, **more)
    row = row_of((tmp_path / name).read_bytes())
    assert (row.encoding, row.height, row.width) == ("PNG", 15, 20)


def test_floating_point_pixels_from_0_to_1_are_read_and_others_out_of_range_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "f.tiff")
    row = row_of((tmp_path / "f.tiff").read_bytes())
    assert (row.encoding, decoded(row.encoded)[..., 0].tolist()) == ("PNG", np.rint(values * 255).tolist())
    Image.fromarray(values - 0.5).save(tmp_path / "f.tiff")
    with pytest.raises(UserError, match=r"picture is not a readable image: .*-0.5"):
        row_of((tmp_path / "f.tiff").read_bytes())


def test_of_an_animation_the_first_picture_is_kept():
    row = row_of(encoded(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (24, 16))]))
    assert (row.encoding, row.height, row.width) == ("PNG", 16, 24)
    assert np.abs(decoded(row.encoded).astype(int) - np.asarray(picture("P").convert("RGB"))).max() == 0


def test_a_turned_image_whose_exif_cannot_be_written_again_is_kept():
    """A camera's name as a floating-point number: Pillow reads such EXIF, and fails to write it."""
    entries = struct.pack(">HHIf", 0x0110, 11, 1, 1.0) + struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0)
    data = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)
    content = JPEG[:20] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + JPEG[20:]
    with pytest.raises(AttributeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    row = row_of(content)
    assert (row.encoded, row.height, row.width) == (content, 24, 16)
    assert (decoded(row.encoded) == np.rot90(np.asarray(Image.open(io.BytesIO(JPEG))), -1)).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_that_is_longer_than_dali_decodes_is_refused(mode: str):
    longest = row_of(encoded(Image.new(mode, (1_000_000, 1), "red" if mode == "RGB" else 99), "PNG"))
    assert decoded(longest.encoded).shape == (1, 1_000_000, 3)
    with pytest.raises(UserError, match="picture has 1000001 x 1 pixels; images of up to 1000000"):
        row_of(encoded(Image.new(mode, (1_000_001, 1)), "PNG"))


# 16-bit images


def warning_of(*images: np.ndarray) -> str | None:
    items = [sources.Item(f"{i}.png", 0, lambda a=a: png_of(a)) for i, a in enumerate(images)]
    return read(sources.Source.of("test", ["a"], {"train": items}))[1].deep.warning()


def png_of(pixels: np.ndarray) -> bytes:
    if pixels.ndim == 3 and pixels.dtype == np.uint16:
        return png(pixels, 16)  # which Pillow does not write
    return encoded(Image.fromarray(pixels), "PNG")


def gray(largest: int, kind: type = np.uint16) -> np.ndarray:
    return np.linspace(0, largest, 24 * 16).reshape(16, 24).astype(kind)


def test_16_bit_images_of_a_narrow_range_are_warned_of():
    said = warning_of(gray(1000), gray(4095), gray(2000), gray(255, np.uint8))
    assert said
    for words in ("1.png has the largest value of the 3 16-bit images", "4095 of 65535", "16 of 256 levels", "scale"):
        assert words in said
    assert "\n" not in said
    deep = np.stack([gray(4095)] * 3, -1)
    assert "0.png has the largest value of the 1 16-bit images" in (warning_of(deep) or "")


def test_16_bit_images_of_the_full_range_are_not():
    assert warning_of(gray(1000), gray(16384)) is None
    assert "16383 of 65535, so 64 of 256" in (warning_of(gray(16383)) or "")
    assert warning_of(np.stack([gray(65535)] * 3, -1)) is None
    assert warning_of(gray(50, np.uint8)) is None
    assert warning_of() is None
