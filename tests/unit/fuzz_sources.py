"""Fuzzing of users' own pictures: what is taken from a source has the pixels that Pillow shows of it, or is refused."""

import io
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
from fuzzing import Group, Refused, outcome, require, tree
from mutations import NAMES, change_bytes, change_file, change_parquet
from PIL import Image, ImageOps

from cifar_dist.data import sources
from cifar_dist.data.check import Checker

ENCODINGS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")


def picture(label: int, number: int, encoding: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(sources.draw_shape(label, (3, number))).save(buffer, encoding)
    return buffer.getvalue()


def upright(content: bytes) -> np.ndarray:
    """Uint8 [H, W, 3], as Pillow shows the file; independent of the project's own reading."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB"))


class Sources(Group):
    areas = ("parquet", "parquet", "pictures")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.checker = Checker()  # one DALI for all cases
        for name in ("cat", "dog"):
            (self.original / "pictures" / "train" / name).mkdir(parents=True)
            for i, encoding in enumerate(ENCODINGS):
                path = self.original / "pictures" / "train" / name / f"{i}.{encoding.lower()}"
                path.write_bytes(picture(name == "dog", i, encoding))
        (self.original / "parquet").mkdir()
        for split in ("train", "test"):
            images = [{"bytes": picture(i % 3, i, ENCODINGS[i % 5]), "path": f"{i}.png"} for i in range(9)]
            table = pa.table({"image": images, "label": [i % 3 for i in range(9)]})
            pq.write_table(table, self.original / "parquet" / f"{split}-00000.parquet", compression="snappy")

    def taken(self, source: sources.Source) -> dict[str, list[tuple[str, int, bytes, tuple]]]:
        """The rows of each split: path, label and pixels as they decode, which have the size that is told."""
        source.checker, rows = self.checker, {}
        for split in source.splits:
            rows[split] = []
            for row in source.rows(split):
                pixels = upright(row.encoded)
                require(pixels.shape[:2] == (row.height, row.width), "another size than was told")
                rows[split].append((row.path, row.label, pixels.tobytes()))
        return rows

    def parquet(self, random: Random, copy: Path) -> None:
        folder = copy / "parquet"
        path = folder / random.choice(["train-00000.parquet", "train-00000.parquet", "test-00000.parquet"])
        match kind := random.choice(["bytes", "bytes", "table", "table", "file", "encrypted", "more"]):
            case "bytes" | "table":
                self.said = change_parquet(random, path, kind)
            case "file":
                self.said = change_file(random, path, folder / "test-00000.parquet")
            case "encrypted":
                path.write_bytes(encrypted(path))
                self.said = "encrypted"
            case "more":
                (folder / f"train-{random.choice(['00001', 'x'])}.parquet").write_bytes(path.read_bytes())
                self.said = "one more file"
        before = tree(folder)
        found = outcome(lambda: self.taken(sources.parquet(str(folder))))
        require(tree(folder) == before, "reading has changed the source")
        if not isinstance(found, Refused):
            wanted = self.rows_of(folder)
            if "test" not in wanted:  # then it is drawn from train
                found, wanted = (sorted(row for part in rows.values() for row in part) for rows in (found, wanted))
            require(found == wanted, "other rows than the files have")

    def rows_of(self, folder: Path) -> dict[str, list[tuple[str, int, bytes]]]:
        """The rows by another reader of the same library, checked in full."""
        rows = {}
        for split in ("test", "train"):
            rows[split] = []
            for path in sorted(folder.glob(f"{split}-*.parquet")):
                table = pq.ParquetFile(io.BytesIO(path.read_bytes())).read()
                table.validate(full=True)
                for i, row in enumerate(table.to_pylist()):
                    image: dict[str, Any] = row["image"]
                    rows[split].append(
                        (image.get("path") or f"row-{i}", row["label"], upright(image["bytes"]).tobytes())
                    )
        return {split: found for split, found in rows.items() if list(folder.glob(f"{split}-*.parquet"))}

    def pictures(self, random: Random, copy: Path) -> None:
        folder = copy / "pictures"
        names = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        for _ in range(random.choice([1, 1, 3])):
            path = random.choice(names)
            if random.random() < 0.8 and path.is_file() and path.stat().st_size:
                changed, self.said = change_bytes(random, path.read_bytes())
                path.write_bytes(changed)
            elif not path.is_dir():
                self.said = change_file(random, path, names[0])
        if random.random() < 0.1:
            name = random.choice([n for n in NAMES if n.isprintable() and "/" not in n and 2 < len(n) < 250])
            shutil.copy(
                self.original / "pictures/train/cat/0.png", folder / random.choice(["", "train", "train/cat"]) / name
            )
            self.said += f", a file {name}"
        before = tree(folder)
        found = outcome(lambda: self.taken(sources.image_folder(str(folder))))
        require(tree(folder) == before, "reading has changed the source")
        if not isinstance(found, Refused):
            rows = sorted(row for split in found.values() for row in split)
            files = [p for p in sorted(folder.glob("train/*/*")) if p.is_file() and not p.name.startswith(".")]
            wanted = [
                (str(p.relative_to(folder)), int(p.parent.name == "dog"), upright(p.read_bytes()).tobytes())
                for p in files
            ]
            require(rows == sorted(wanted), "other pictures than the files have")


class Keys(encryption.KmsClient):
    """Keys that are in the file."""

    def __init__(self, _config: Any) -> None:
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key_bytes: bytes, _name: str) -> bytes:
        return key_bytes.hex().encode()

    def unwrap_key(self, wrapped_key: bytes, _name: str) -> bytes:
        return bytes.fromhex(wrapped_key.decode())


def encrypted(path: Path) -> bytes:
    """The same table, which nobody reads without its key."""
    config = encryption.EncryptionConfiguration(footer_key="a", column_keys={"b": ["label"]})
    made = encryption.CryptoFactory(Keys).file_encryption_properties(encryption.KmsConnectionConfig(), config)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, pq.read_schema(path), encryption_properties=made) as writer:
        writer.write_table(pq.read_table(path))
    return buffer.getvalue()


def make(folder: Path) -> Group:
    return Sources(folder)
