"""Webdataset shards: pictures and their labels, side by side in tar archives."""

import io
import json
import tarfile
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from prepared import contents, png, read, rows

from cifar_dist.data import sources
from cifar_dist.data.sources.archives import TarTree
from cifar_dist.data.sources.source import FileReader, items_table
from cifar_dist.data.sources.trees import FolderTree
from cifar_dist.data.sources.webdataset import ShardTree
from cifar_dist.data.sources.zips import ZipTree
from cifar_dist.errors import UserError


def shard(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(num: int, first: int = 0, label: Any = lambda i: f"{i % 2}", suffix: str = "cls") -> dict[str, bytes | str]:
    """Pictures `first` and on, each with its label behind it."""
    files: dict[str, bytes | str] = {}
    for i in range(num):
        files |= {f"{i:04d}.png": png(first + i), f"{i:04d}.{suffix}": label(first + i)}
    return files


def source_of(path: Path, **options: Any) -> sources.Source:
    return sources.find_source("folder", str(path), **options)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder whose name no test had before: an archive is opened once by a process."""
    (tmp_path / uuid.uuid4().hex).mkdir()
    return next(tmp_path.iterdir())


LABELS = {
    "numbers": ("cls", lambda i: f"{i % 2}", ["0", "1"]),
    "numbers with a line's end": ("cls", lambda i: f"{i % 2}\n", ["0", "1"]),
    "numbers above 9": ("cls", lambda i: f"{9 + i % 2}", ["9", "10"]),
    "texts": ("cls", lambda i: ("dog", "cat")[i % 2], ["dog", "cat"]),
    "JSON": ("json", lambda i: json.dumps({"label": i % 2, "width": 8}), ["0", "1"]),
    "JSON, texts": ("json", lambda i: json.dumps({"class": ("dog", "cat")[i % 2]}), ["dog", "cat"]),
}


@pytest.mark.parametrize(("suffix", "label", "names"), LABELS.values(), ids=LABELS)
def test_shards_of_equal_names_are_read_with_their_labels(tmp_path: Path, suffix: str, label: Any, names: list[str]):
    for number, name in enumerate(["train-000000.tar", "train-000001.tar", "test-000000.tar"]):
        shard(tmp_path / name, samples(4, 4 * number, label, suffix))
    (tmp_path / "README.md").write_text("about them")
    source = source_of(tmp_path)
    assert sorted(source.class_names) == sorted(names)
    if names[0].isdecimal():
        assert source.class_names == names
    found = {
        split: [(r.path, source.class_names[r.label], r.encoded) for r in rows(source, split)]
        for split in source.splits
    }
    wanted = [(f"{i % 4:04d}.png", names[i % 2], png(i)) for i in range(12)]
    assert found == {"train": wanted[:8], "test": wanted[8:]}
    assert source.layout.startswith("webdataset, 3 shards: ")


def test_a_shard_alone_and_shards_without_a_split_are_train(tmp_path: Path):
    path = shard(tmp_path / "pictures.tar", samples(10))
    wanted = {f"{i:04d}.png": (png(i), f"{i % 2}") for i in range(10)}
    for where in (path, tmp_path):
        source = source_of(where)
        assert source.drawn == ["test"]
        assert contents(source) == wanted


def test_the_key_in_json_is_chosen_by_option(tmp_path: Path):
    shard(
        tmp_path / "train-0.tar", samples(4, label=lambda i: json.dumps({"label": "x", "kind": i % 2}), suffix="json")
    )
    source = source_of(tmp_path, label_column="kind", test_fraction=0.5)
    assert contents(source) == {f"{i:04d}.png": (png(i), f"{i % 2}") for i in range(4)}


def test_a_number_beats_json_and_other_files_are_left_out(tmp_path: Path):
    files = samples(4) | {f"{i:04d}.json": json.dumps({"label": 7}) for i in range(4)} | {"0000.txt": "a caption"}
    source = source_of(shard(tmp_path / "train-0.tar", files), test_fraction=0.5)
    assert source.class_names == ["0", "1"]
    assert [out.path for out in source.left_out] == ["0000.txt"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0001.cls": None}, "has no label: 0001.cls or 0001.json is missing"),
        ({"0001.jpg": png(9)}, "0001 has two pictures; a sample has one"),
        ({"0001.cls": ""}, "names no class"),
        ({"0001.cls": b"\xff"}, "0001.cls holds no label"),
        ({"0001.cls": None, "0001.json": "{}"}, "0001.json holds no label .* --label-column"),
        ({"0001.cls": None, "0001.json": "[1]"}, "0001.json holds no label"),
        ({"0001.cls": None, "0001.json": "{"}, "0001.json holds no label"),
        ({"0001.cls": None, "0001.json": '{"label": 0.5}'}, "has the label 0.5; a number or a text is read"),
        ({"0001.cls": None, "0001.json": '{"label": null}'}, "has the label None; a number or a text is read"),
        ({"0001.cls": b"1" * (2 << 20)}, "has 2097152 bytes; a label has at most"),
    ],
    ids=range(10),
)
def test_a_sample_that_is_not_whole_is_refused(tmp_path: Path, changed: dict[str, Any], message: str):
    files = {name: content for name, content in {**samples(4), **changed}.items() if content is not None}
    shard(tmp_path / "train-0.tar", files)
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path)
    assert "train-0.tar" in str(caught.value)


def test_a_shard_without_a_split_beside_others_is_refused(tmp_path: Path):
    shard(tmp_path / "train-0.tar", samples(4))
    shard(tmp_path / "more.tar", samples(4))
    with pytest.raises(UserError, match=f"{tmp_path}: more.tar names no split and other shards do; rename it"):
        source_of(tmp_path)


def test_shards_of_test_only_are_refused(tmp_path: Path):
    shard(tmp_path / "test-0.tar", samples(4))
    with pytest.raises(UserError, match="train"):
        source_of(tmp_path)


def test_a_bad_picture_is_named_with_its_shard(tmp_path: Path):
    shard(tmp_path / "train-0.tar", samples(4))
    shard(tmp_path / "train-1.tar", {**samples(4, 4), "0002.png": b"text"})
    shard(tmp_path / "test-0.tar", samples(4, 8))
    with pytest.raises(UserError, match=r"train-1.tar.*0002.png is no"):
        read(source_of(tmp_path))


def test_a_test_split_without_labels_is_left_out_and_told(tmp_path: Path):
    shard(tmp_path / "train-0.tar", samples(10))
    shard(tmp_path / "test-0.tar", samples(4, 20, lambda _: "-1"))
    source = source_of(tmp_path)
    assert source.notes == ["test is left out: its 4 rows have no labels"]
    assert contents(source).keys() == {f"{i:04d}.png" for i in range(10)}


def test_remote_trees_read_ahead_in_order_and_zip_does_not(tmp_path: Path):
    class Slow:
        reads_ahead, waiting, most = True, 0, 0

        def where(self, name: str, _at: int = 0) -> str:
            return name

        def read(self, name: str, _size: int, _at: int) -> bytes:
            self.waiting += 1
            time.sleep(0.05)
            self.most = max(self.most, self.waiting)
            self.waiting -= 1
            return name.encode()

    tree = Slow()
    items = items_table([str(i) for i in range(20)], [0] * 20, num_bytes=1)
    found = [read().data for read in FileReader(tree).reads(items)]  # type: ignore[arg-type]
    assert found == [str(i).encode() for i in range(20)]
    assert tree.most > 1
    tar = TarTree(uri="s3://bucket/a", shown="s3://bucket/a", version="")
    assert tar.reads_ahead
    assert ShardTree((tar,)).reads_ahead
    assert not ZipTree(uri="s3://bucket/a", version="").reads_ahead
    assert not FolderTree(uri=str(tmp_path)).reads_ahead


@pytest.mark.parametrize("text", ["--1", "9" * 5000, str(10**30)], ids=["sign", "digits", "number"])
@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_odd_numbers_are_labels(tmp_path: Path, text: str, suffix: str):
    labels = [text, "2"] if suffix == "cls" else [json.dumps({"label": text}), '{"label": "2"}']
    shard(tmp_path / "a.tar", samples(6, label=lambda i: labels[i % 2], suffix=suffix))
    assert set(source_of(tmp_path, test_fraction=0.34).class_names) == {text, "2"}


def test_large_numbers_in_json_are_labels(tmp_path: Path):
    shard(tmp_path / "a.tar", samples(6, label=lambda i: json.dumps({"label": 10 ** (30 * (i % 2))}), suffix="json"))
    assert source_of(tmp_path, test_fraction=0.34).class_names == ["1", str(10**30)]


def test_json_that_is_too_deep_is_refused(tmp_path: Path):
    shard(tmp_path / "a.tar", samples(6, label=lambda _: "[" * 900_000, suffix="json"))
    with pytest.raises(UserError, match=r"0000.json holds no label"):
        source_of(tmp_path)


def test_json_beside_pictures_in_class_folders_is_a_note(tmp_path: Path):
    files = {
        f"{c}/{i}.{s}": png(int(i)) if s == "png" else "{}"
        for c in ("cat", "dog")
        for i in "01"
        for s in ("png", "json")
    }
    source = source_of(shard(tmp_path / "a.tar", files), test_fraction=0.5)
    assert (source.class_names, source.layout) == (["cat", "dog"], "folders CLASS/*")
    assert {out.kind for out in source.left_out} == {"notes and other files"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("image_column", "--image-column has no effect on the webdataset shards in"),
        (
            "label_column",
            "0000.png has its label in 0000.cls, and --label-column names a key of 0000.json; leave it out",
        ),
    ],
)
def test_columns_without_effect_are_refused(tmp_path: Path, option: str, message: str):
    shard(tmp_path / "a.tar", samples(4))
    with pytest.raises(UserError, match=message):
        source_of(tmp_path, **{option: "x"})
