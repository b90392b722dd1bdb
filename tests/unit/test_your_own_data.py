"""Each layout in the table of docs/data.md is prepared by the command that the table shows."""

import io
import json
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_dist.cli import prepare
from cifar_dist.data.manifest import read_manifest
from cifar_dist.storage import Folder

ROOT = Path(__file__).parents[2]
TABLE = re.findall(r"^\| (.*) \| `(--source .*)` \|$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
COUNTS = {"cat": 6, "dog": 4}


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures(prefix: str = "", inner: str = "", first: int = 0) -> dict[str, bytes]:
    """Six cats and four dogs in class folders, by name; `first` makes them differ from others."""
    found = {}
    for name, count in COUNTS.items():
        for i in range(count):
            found[f"{prefix}{name}/{inner}{i}.jpg"] = jpeg(first + 100 * len(name) + 10 * (name == "dog") + i)
    return found


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def splits() -> dict[str, bytes]:
    return pictures("train/") | pictures("val/", first=1000) | pictures("test/", first=2000)


def loose() -> tuple[dict[str, bytes], str]:
    """The pictures without class folders, and the rows of a table of labels."""
    files, lines = {}, ""
    for number, (name, content) in enumerate(pictures().items()):
        files[f"{number}.jpg"] = content
        lines += f"{number}.jpg,{name.split('/')[0]}\n"
    return files, lines


def table_of(names: list[str] | None = None, column: str = "label", more: str = "") -> pa.Table:
    files = pictures()
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    labels = [int(name.startswith("dog")) for name in files]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind), column: labels, **({more: [0, 1] * 5} if more else {})}
    features = {"image": {"_type": "Image"}, column: {"_type": "ClassLabel", "names": names or ["cat", "dog"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def make_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        for name, content in splits().items():
            archive.writestr(f"pictures/{name}", content)
        archive.writestr("__MACOSX/pictures/._train", b"")


def tar(path: Path, files: dict[str, bytes], mode: str) -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def make_loose(folder: Path) -> None:
    files, lines = loose()
    write(folder / "loose", files)
    (folder / "labels.csv").write_text("path,label\n" + lines)


def make_metadata(folder: Path) -> None:
    files, lines = loose()
    write(folder / "metadata" / "train", files)
    (folder / "metadata" / "train" / "metadata.csv").write_text("file_name,label\n" + lines)


def make_hub(folder: Path) -> None:
    (folder / "hub" / "data").mkdir(parents=True)
    (folder / "hub" / "README.md").write_text("---\nlicense: mit\n---\n")
    table = table_of()
    pq.write_table(table.slice(0, 5), folder / "hub" / "data" / "train-00000-of-00002-0123456789abcdef.parquet")
    pq.write_table(table.slice(5), folder / "hub" / "data" / "train-00001-of-00002-0123456789abcdef.parquet")
    pq.write_table(table, folder / "hub" / "data" / "test-00000-of-00001-0123456789abcdef.parquet")


def make_cifar100(folder: Path) -> None:
    (folder / "cifar100").mkdir()
    for split in ("train", "test"):
        pq.write_table(table_of(None, "coarse_label", more="fine_label"), folder / "cifar100" / f"{split}.parquet")


def make_saved(folder: Path) -> None:
    """As `datasets` writes it: an Arrow stream, and JSON files beside it."""
    for split in ("train", "test"):
        inner = folder / "saved" / split
        inner.mkdir(parents=True)
        table = table_of()
        with (
            pa.OSFile(str(inner / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as w,
        ):
            w.write_table(table, max_chunksize=3)
        (inner / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (inner / "dataset_info.json").write_text("{}")
    (folder / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def make_shards(folder: Path) -> None:
    (folder / "shards").mkdir()
    for split, first in (("train", 0), ("test", 1000)):
        files = {}
        for number, (name, content) in enumerate(pictures(first=first).items()):
            files |= {f"{number:04d}.jpg": content, f"{number:04d}.cls": name.split("/")[0].encode()}
        tar(folder / "shards" / f"{split}-000000.tar", files, "w")


MAKE: dict[str, Callable[[Path], None]] = {
    "classes": lambda folder: write(folder / "classes", pictures()),
    "splits": lambda folder: write(folder / "splits", splits()),
    "nested": lambda folder: write(folder / "nested", pictures(inner="2024/may/")),
    "loose": make_loose,
    "metadata": make_metadata,
    "pictures.zip": make_archive,
    "pictures.tar.gz": lambda folder: tar(folder / "pictures.tar.gz", splits(), "w:gz"),
    "hub": make_hub,
    "cifar100": make_cifar100,
    "saved": make_saved,
    "shards": make_shards,
}
WITH_VALIDATION = {"splits", "pictures.zip", "pictures.tar.gz"}
WITH_TEST = WITH_VALIDATION | {"hub", "cifar100", "saved", "shards"}


def test_the_table_shows_each_layout_once():
    paths = [re.findall(r"--path (\S+)", options)[0] for _, options in TABLE]
    assert sorted(paths) == sorted([*MAKE, "s3://bucket/pictures"])


@pytest.mark.parametrize(("layout", "options"), TABLE)
def test_each_command_of_the_table(tmp_path: Path, layout: str, options: str, s3: str, monkeypatch: pytest.MonkeyPatch):
    words = shlex.split(options)
    path = words[words.index("--path") + 1]
    if path.startswith("s3://"):
        for name, content in splits().items():
            Folder(path + s3).write(name, content)
        words[words.index("--path") + 1] = path + s3
    else:
        MAKE[path](tmp_path)
    monkeypatch.chdir(tmp_path)
    prepare.run(prepare.COMMAND.parse(["--out", "data", *words], "cifar-dist prepare"))
    manifest = read_manifest(str(tmp_path / "data"))
    assert manifest.class_names == ["cat", "dog"], layout
    assert ("validation" in manifest.splits) == (path in WITH_VALIDATION or path.startswith("s3://"))
    per_class = {split: entry["num_rows_per_class"] for split, entry in manifest.splits.items()}
    if path in WITH_TEST or path.startswith("s3://"):
        assert all(counts == [6, 4] for counts in per_class.values())
    else:
        assert np.sum(list(per_class.values()), axis=0).tolist() == [6, 4]
    stored = pq.read_table(tmp_path / "data" / "train-00000.parquet")
    known = {content: name.split("/")[0] for name, content in pictures().items()}
    for image, label in zip(stored["image"].to_pylist(), stored["label"].to_pylist(), strict=True):
        assert known[image["bytes"]] == manifest.class_names[label]
