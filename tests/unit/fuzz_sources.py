"""Fuzzing of users' own pictures: what is taken from a source has the pixels that Pillow shows of it, or is refused."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
from fuzzing import Group, Refused, outcome, require, tree
from mutations import NAMES, change_bytes, change_file, change_parquet, change_zip
from PIL import Image, ImageOps
from prepared import rows

from cifar_dist.data import sources

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
    areas = ("parquet", "parquet", "pictures", "archive", "labels")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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

        self.pack()

    def pack(self) -> None:
        """The pictures in archives, and in a table of labels."""
        (self.original / "archives").mkdir()
        files = sorted((self.original / "pictures").rglob("*.*"))
        with (
            zipfile.ZipFile(self.original / "archives" / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as packed,
            tarfile.open(self.original / "archives" / "pictures.tar", "w") as plain,
            tarfile.open(self.original / "archives" / "pictures.tar.gz", "w:gz") as compressed,
        ):
            for file in files:
                name = str(file.relative_to(self.original / "pictures"))
                packed.write(file, name)
                plain.add(file, name)
                compressed.add(file, name)
        self.pixels = {upright(file.read_bytes()).tobytes() for file in files}
        shutil.copytree(self.original / "pictures" / "train", self.original / "labelled")
        lines = [f"{f.parent.name}/{f.name},{f.parent.name}" for f in files]
        (self.original / "labelled" / "labels.csv").write_text("\n".join(["path,label", *lines]))

    def taken(self, source: sources.Source) -> dict[str, list[tuple[str, str, bytes]]]:
        """The rows of each split: path, class and pixels as they decode, which have the size that is told."""
        taken = {}
        for split in source.splits:
            taken[split] = []
            for row in rows(source, split):
                pixels = upright(row.encoded)
                require(pixels.shape[:2] == (row.height, row.width), "another size than was told")
                taken[split].append((row.path, source.class_names[row.label], pixels.tobytes()))
        return taken

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
        found = outcome(lambda: self.taken(sources.find_source("parquet", str(folder))))
        require(tree(folder) == before, "reading has changed the source")
        if not isinstance(found, Refused):
            wanted = self.rows_of(folder)
            if "test" not in wanted:  # then it is drawn from train
                found, wanted = (sorted(row for part in rows.values() for row in part) for rows in (found, wanted))
            require(found == wanted, "other rows than the files have")

    def rows_of(self, folder: Path) -> dict[str, list[tuple[str, str, bytes]]]:
        """The rows by another reader of the same library, checked in full; without a split that has no labels."""
        found = {}
        for split in ("test", "train"):
            for path in sorted(p for p in folder.glob(f"{split}-*.parquet") if p.is_file()):
                table = pq.ParquetFile(io.BytesIO(path.read_bytes())).read()
                table.validate(full=True)
                for i, row in enumerate(table.to_pylist()):
                    image: dict[str, Any] = row.get("image") or row["picture"]
                    picture = upright(image["bytes"]).tobytes()
                    found.setdefault(split, []).append(
                        (image.get("path") or f"row-{i}", text_of(row["label"]), picture)
                    )
        return {split: part for split, part in found.items() if any(label for _, label, _ in part)}

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
        source = outcome(lambda: sources.find_source("folder", str(folder)))
        found = source if isinstance(source, Refused) else outcome(lambda: self.taken(source))
        require(tree(folder) == before, "reading has changed the source")
        if not isinstance(found, Refused):
            told = {out.path for out in source.left_out}
            files = [p for p in folder.rglob("*") if not p.is_dir() and str(p.relative_to(folder)) not in told]
            wanted = [(str(p.relative_to(folder)), p.parent.name, upright(p.read_bytes()).tobytes()) for p in files]
            taken = sorted(row for split in found.values() for row in split)
            require(taken == sorted(wanted), "other pictures than the files have")

    def archive(self, random: Random, copy: Path) -> None:
        """No picture is other than it was packed: archives have checksums, but for tar, where pictures are cut off."""
        path = copy / "archives" / random.choice(["pictures.zip", "pictures.zip", "pictures.tar", "pictures.tar.gz"])
        change = change_zip if path.suffix == ".zip" and random.random() < 0.7 else change_bytes
        changed, self.said = change(random, path.read_bytes())
        path = path.with_name(f"{random.getrandbits(64)}-{path.name}")  # archives are opened once by a process
        path.write_bytes(changed)
        before = tree(copy)
        found = outcome(lambda: self.taken(sources.find_source("folder", str(path))))
        require(tree(copy) == before, "reading has changed the source, or written beside it")
        if not isinstance(found, Refused) and path.suffix == ".zip":
            pixels = {row[-1] for part in found.values() for row in part}
            require(pixels <= self.pixels, "pixels that no picture in the archive had")

    def labels(self, random: Random, copy: Path) -> None:
        """A row more, less or other in the table of labels: nothing that it says is lost."""
        table = copy / "labelled" / "labels.csv"
        changed, self.said = change_bytes(random, table.read_bytes())
        table.write_bytes(changed)
        before = tree(copy / "labelled")
        found = outcome(lambda: self.taken(sources.find_source("folder", str(table.parent), labels=str(table))))
        require(tree(copy / "labelled") == before, "reading has changed the source")
        if not isinstance(found, Refused):
            told = sorted((path, label) for part in found.values() for path, label, _ in part)
            said = changed.decode("utf-8-sig").splitlines()
            require(
                len(told) >= len([line for line in said if line.strip(", \t;\f\v")]) - 1, "fewer rows than the table"
            )
            require(all(label in changed.decode() for _, label in told), "a class that the table does not name")


def text_of(label: Any) -> str:
    """The class that a label names, empty if it names none."""
    if label is None or label == -1:
        return ""
    return str(int(label)) if isinstance(label, float) else str(label)


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
