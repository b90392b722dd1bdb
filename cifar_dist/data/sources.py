"""Where images come from: CIFAR-10, image folders, Parquet, drawn shapes. All give rows of (encoded bytes, label).

What a row stores decodes in DALI to the pixels that Pillow shows upright: the file as it came where check.py finds it
so, else a lossless PNG of those pixels.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageOps, TiffImagePlugin

from cifar_dist.data.check import Checker, Picture
from cifar_dist.data.order import TEST, stratified_split
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, from_json, is_texts, join_uri

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_SIDE = 1_000_000  # pixels: more than libpng decodes
PNG_START = b"\x89PNG"
BITS_PER_SAMPLE = 258  # the TIFF tag
# What is data and no remark beside it: where it would not be read, the job stops.
DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".npy", ".npz", ".h5", ".pkl", ".tfrecord"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"),
}


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


@dataclass
class Source:
    """A data set to be stored: class names in label order and, per split, the items."""

    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]
    skipped: list[str] = field(default_factory=list)
    deep: DeepImages = field(default_factory=DeepImages)
    checker: Checker = field(default_factory=Checker)

    def rows(self, split: str, skip_bad: bool = False) -> Iterator[Row]:
        """The split's checked rows. A bad image is a UserError, or with `skip_bad` noted in `skipped`."""
        for picture, sound in self.checker.checked(self._pictures(split, skip_bad)):
            row = picture.owner
            if not sound and picture.pixels is not None:
                row = replace(row, encoded=encode_png(picture.pixels), encoding="PNG")
            yield row

    def _pictures(self, split: str, skip_bad: bool) -> Iterator[Picture[Row]]:
        for item in self.splits[split]:
            try:
                yield examined(item, self.deep)
            except UserError as error:
                if not skip_bad:
                    raise UserError(f"{error}; mend or remove it, or leave such files out with --skip-bad") from error
                self.skipped.append(str(error))

    def forget(self) -> None:
        """Forgets what was found in an earlier reading."""
        self.skipped.clear()
        self.deep = DeepImages()


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


def draw_test_split(items: list[Item], class_names: list[str], fraction: float, seed: int) -> dict[str, list[Item]]:
    """Train and test drawn from `items` by a seeded, stratified permutation."""
    labels = np.array([item.label for item in items])
    for label, name in enumerate(class_names):
        if (labels == label).sum() < 2:
            raise UserError(f"class {name!r} has fewer than 2 images, so no test split can be drawn from train")
    train, test = stratified_split(labels, fraction, (TEST, seed))
    return {"train": [items[i] for i in train], "test": [items[i] for i in test]}


def cifar10(path: str | None) -> Source:
    """CIFAR-10 (60,000 images, 32 px) by torchvision's downloader, which checks its checksums; kept as PNG."""
    from torchvision.datasets import CIFAR10  # noqa: PLC0415 - slow to import, needed here only

    try:
        root = Path(os.path.expanduser(path)) if path else Path.home() / ".cache" / "cifar_dist"
    except RuntimeError as error:
        raise UserError(
            "HOME is not set, so there is no folder to keep CIFAR-10 in; set it, or name a folder with --path"
        ) from error
    if path and not root.is_dir():
        raise UserError(f"the folder {root} does not exist; --path names where CIFAR-10 is or shall be kept")
    try:
        parts = {split: CIFAR10(str(root), train=split == "train", download=True) for split in ("train", "test")}
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} to {root} ({error}). Without a network, fetch "
            f"{CIFAR10.filename} elsewhere, put it into a folder and name that folder with --path; or use "
            "--source folder on images of your own, or --source shapes, which needs no network"
        ) from error

    def items(split: str) -> list[Item]:
        data: np.ndarray = parts[split].data
        targets = parts[split].targets
        return [Item(f"{split}-{i:05d}.png", targets[i], partial(data.__getitem__, i)) for i in range(len(data))]

    return Source("cifar10", list(parts["train"].classes), {split: items(split) for split in parts})


def image_folder(path: str | None, test_fraction: float = 0.2, seed: int = 0) -> Source:
    """train/CLASS/* and test/CLASS/*; labels follow the sorted class folders; a missing test split is drawn."""
    root = Path(os.path.expanduser(path or ""))
    if not path or not (root / "train").is_dir():
        raise UserError(
            f"{path or '(no --path)'} holds no folder named train; --source folder reads PATH/train/CLASS/IMAGE and, "
            "if it is there, PATH/test/CLASS/IMAGE"
        )
    for folder, read in ((root, {"train", "test"}), (root / "train", set()), (root / "test", set())):
        for entry in visible(folder) if folder.is_dir() else []:
            if entry.name not in read and (entry.suffix.lower() in DATA_SUFFIXES or (read and entry.is_dir())):
                raise UserError(
                    f"{entry} would not be read: --source folder reads PATH/train/CLASS/IMAGE and "
                    "PATH/test/CLASS/IMAGE; move it away, or name a folder of links to "
                    "train and to what is the test split"
                )
    class_names = [p.name for p in visible(root / "train") if p.is_dir()]
    need_two_classes(str(root / "train"), class_names)

    def items(split: str) -> list[Item]:
        found = {p.name for p in visible(root / split) if p.is_dir()}
        if extra := sorted(found - set(class_names)):
            raise UserError(f"class {extra[0]!r} is in {root / split} but not in {root / 'train'}")
        rows = []
        for label, name in enumerate(class_names):
            files = visible(root / split / name) if name in found else []
            if not files:
                raise UserError(f"class {name!r} has no images in {root / split}; add some or remove the class")
            if inner := next((p for p in files if p.is_dir()), None):
                num_files = sum(p.is_file() for p in inner.rglob("*"))
                raise UserError(
                    f"{inner} is a folder inside a class's folder, and its {num_files} files would not be read; move "
                    f"its images up into {inner.parent}, or move it away"
                )
            rows += [Item(f"{split}/{name}/{p.name}", label, partial(read_file, p), str(p)) for p in files]
        return rows

    train = items("train")
    if (root / "test").is_dir():
        splits = {"train": train, "test": items("test")}
    else:
        splits = draw_test_split(train, class_names, test_fraction, seed)
    return Source("folder", class_names, splits)


def need_two_classes(where: str, class_names: list[str]) -> None:
    if len(class_names) < 2:
        raise UserError(f"{where} holds {len(class_names)} classes; a classifier needs 2 or more")


def visible(folder: Path) -> list[Path]:
    """The folder's entries sorted by name, without hidden ones."""
    found = sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    for path in found:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{str(path)!r} has a name that is not UTF-8; rename it") from None
    return found


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def parquet(path: str | None, test_fraction: float = 0.2, seed: int = 0) -> Source:
    """Hugging Face layout: train*.parquet and test*.parquet with `image` (or `img`) {bytes, path} and `label`."""
    if not path:
        raise UserError("--source parquet needs --path, a folder of train-*.parquet and test-*.parquet")
    folder = Folder(path)
    names = [n for n in folder.names() if n.endswith(".parquet")]
    if not names and "data" in folder.names():
        refuse_unread(folder, {"data"})
        folder = Folder(join_uri(path, "data"))
        names = [n for n in folder.names() if n.endswith(".parquet")]
    tables = {split: [n for n in names if re.match(rf"{split}\b", n)] for split in ("train", "test")}
    if not tables["train"]:
        raise UserError(f"{path} holds no train*.parquet; --source parquet reads the Hugging Face layout")
    refuse_unread(folder, {name for files in tables.values() for name in files})
    loaded = {split: [read_parquet(folder, n) for n in files] for split, files in tables.items() if files}
    class_names = parquet_classes(path, [table for parts in loaded.values() for _, table in parts])
    need_two_classes(path, class_names)
    splits = {
        split: [item for name, table in parts for item in parquet_items(name, table, len(class_names))]
        for split, parts in loaded.items()
    }
    if "test" not in splits:
        splits = draw_test_split(splits["train"], class_names, test_fraction, seed)
    return Source("parquet", class_names, splits)


def refuse_unread(folder: Folder, read: set[str]) -> None:
    """Raises UserError that names a folder or a file of data which is not in `read`."""
    inner = set(folder.folders())
    for name in folder.names():
        is_data = name in inner or Path(name).suffix.lower() in DATA_SUFFIXES
        if is_data and name not in read and not name.startswith((".", "_")):
            raise UserError(
                f"{join_uri(folder.uri, name)} would not be read: --source parquet reads train*.parquet and "
                "test*.parquet; rename it, or move it away"
            )


def read_parquet(folder: Folder, name: str) -> tuple[str, pa.Table]:
    """(path, table with the columns image and label)."""
    where = join_uri(folder.uri, name)
    try:
        table = pq.read_table(folder.at(name), filesystem=folder.fs)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{where} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    image = next((c for c in ("image", "img") if c in table.column_names), None)
    if image is None or "label" not in table.column_names:
        found = ", ".join(table.column_names)
        raise UserError(f"{where} has the columns {found}; an image (bytes, path) and a label column are needed")
    kind, label_kind = table.schema.field(image).type, table.schema.field("label").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise UserError(f"{where}: column {image} is {kind}; struct<bytes: binary, path: string> is needed")
    if not pa.types.is_integer(label_kind):
        raise UserError(f"{where}: column label is {label_kind}; integers are needed")
    columns = {"image": table[image], "label": table["label"]}
    return where, pa.table(columns).replace_schema_metadata(table.schema.metadata)


def parquet_classes(path: str, tables: list[pa.Table]) -> list[str]:
    """Class names from the Hugging Face metadata, or '0', '1', ... up to the largest label."""
    try:
        info = from_json((tables[0].schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info.get("info", {}).get("features", {}).get("label", {}).get("names")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} has Hugging Face metadata that cannot be read ({error}); write it again") from error
    if names:
        if not is_texts(names):
            raise UserError(f"{path} has Hugging Face metadata whose class names are no list of names; write it again")
        return names
    labels = [value for table in tables for value in table["label"].to_pylist() if value is not None]
    largest = max(labels, default=-1)
    if not 0 <= largest < len(labels):
        raise UserError(f"{path} has {len(labels)} labels up to {largest}; each class from 0 on needs images")
    return [str(i) for i in range(largest + 1)]


def parquet_items(where: str, table: pa.Table, num_classes: int) -> list[Item]:
    content = pc.struct_field(table["image"], "bytes")
    has_paths = table.schema.field("image").type.get_field_index("path") >= 0
    paths = pc.struct_field(table["image"], "path") if has_paths else pa.nulls(len(table), pa.string())
    items = []
    for row, label in enumerate(table["label"].to_pylist()):
        if label is None or not 0 <= label < num_classes:
            raise UserError(f"{where} row {row} has the label {label}; 0 to {num_classes - 1} are valid")
        name = paths[row].as_py() or f"row-{row}"
        items.append(Item(name, label, partial(arrow_bytes, content, row), f"{where} row {row}"))
    return items


def arrow_bytes(column: pa.ChunkedArray, row: int) -> bytes:
    """The row's image; paths to files outside the Parquet file are not followed."""
    return column[row].as_py() or b""


SHAPES = ["circle", "cross", "diamond", "frame", "grid", "ring", "square", "star", "stripes", "triangle"]


def shapes(num_train: int = 1000, num_test: int = 500, seed: int = 0) -> Source:
    """Ten classes of drawn 32-px images, made from the seed: data that needs no network."""
    if min(num_train, num_test) < 2 * len(SHAPES):
        raise UserError(f"--num-train and --num-test must be {2 * len(SHAPES)} or more, two images per class")

    def items(split: str, count: int, key: int) -> list[Item]:
        return [
            Item(f"{split}-{i:05d}.png", i % len(SHAPES), partial(draw_shape, i % len(SHAPES), (seed, key, i)))
            for i in range(count)
        ]

    return Source("shapes", SHAPES, {"train": items("train", num_train, 0), "test": items("test", num_test, 1)})


def draw_shape(label: int, key: tuple[int, ...], size: int = 32) -> np.ndarray:
    """uint8 [size, size, 3]: the shape in a random colour, place and size on a noisy ground of another colour."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    scale = 4  # drawn larger and reduced, for smooth edges
    ground = random.integers(0, 120, 3)
    colour = tuple(int(c) for c in (ground + random.integers(90, 136, 3)))
    image = Image.new("RGB", (size * scale, size * scale), tuple(int(c) for c in ground))
    draw = ImageDraw.Draw(image)
    radius = random.uniform(0.28, 0.42) * size * scale
    x, y = (random.uniform(radius, size * scale - radius) for _ in range(2))
    box, width = (x - radius, y - radius, x + radius, y + radius), max(int(radius / 4), 1)

    def polygon(corners: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        reach = radius * np.where(np.arange(corners) % 2, inner, 1.0)
        return [(float(x + r * np.sin(a)), float(y - r * np.cos(a))) for a, r in zip(angles, reach, strict=True)]

    match SHAPES[label]:
        case "circle":
            draw.ellipse(box, fill=colour)
        case "cross":
            draw.rectangle((x - radius, y - width, x + radius, y + width), fill=colour)
            draw.rectangle((x - width, y - radius, x + width, y + radius), fill=colour)
        case "diamond":
            draw.polygon(polygon(4, 0.0), fill=colour)
        case "frame":
            draw.rectangle(box, outline=colour, width=width)
        case "grid":
            for step in np.linspace(-radius, radius, 4):
                draw.line((x + step, y - radius, x + step, y + radius), fill=colour, width=width // 2)
                draw.line((x - radius, y + step, x + radius, y + step), fill=colour, width=width // 2)
        case "ring":
            draw.ellipse(box, outline=colour, width=width)
        case "square":
            draw.rectangle(box, fill=colour)
        case "star":
            draw.polygon(polygon(10, 0.0, inner=0.4), fill=colour)
        case "stripes":
            for step in np.linspace(-radius, radius, 4):
                draw.line((x - radius, y + step, x + radius, y + step), fill=colour, width=width)
        case "triangle":
            draw.polygon(polygon(3, 0.0), fill=colour)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.int64)
    return (pixels + random.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
