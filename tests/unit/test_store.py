"""The store: what is written, what is refused, and staging under concurrency, damage and crashes."""

import ctypes
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prepared import rows

from cifar_dist.data import parts, sources, staged, store
from cifar_dist.data.making import Row
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.private import Staging, once_per_node
from cifar_dist.data.sources.source import ItemReader
from cifar_dist.data.staged import DataSet, StagedSplit
from cifar_dist.errors import UserError
from cifar_dist.sealed_json import seal, to_json


def files_of(folder: str | Path) -> dict[str, bytes]:
    """Every file below the folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


FILES = ["_manifest.json", "data_card.json", "test-00000.parquet", "train-00000.parquet"]  # of small shapes


def published(folder: str | Path) -> dict[str, bytes]:
    """The files of the folder but for those in PREPARING."""
    return {name: content for name, content in files_of(folder).items() if not name.startswith(store.PREPARING)}


def small_shapes(seed: int = 0) -> sources.Source:
    return sources.shapes(20, 20, seed)


def shapes_but_for_the_last(read: Callable[[], Any], seed: int = 0) -> sources.Source:
    """Small shapes; the last image of test is what `read` gives."""
    source = small_shapes(seed)
    source.reader.items[-1] = sources.Item("broken.png", 9, read)
    return dataclasses.replace(source, reader=ItemReader(source.reader.items, f"{seed} {read}"))


def failing(seed: int = 0) -> sources.Source:
    return shapes_but_for_the_last(lambda: b"no image", seed)


@pytest.fixture
def data(shapes_uri: str, tmp_path: Path) -> str:
    """A copy of the shared data set, to be changed."""
    shutil.copytree(shapes_uri, tmp_path / "data")
    return str(tmp_path / "data")


# At rest


def test_prepared_twice_gives_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        assert store.prepare(small_shapes(), str(tmp_path / name))[1]
    files = files_of(tmp_path / "one")
    assert sorted(files) == FILES
    assert files == files_of(tmp_path / "two")


def test_the_same_data_again_writes_nothing(tmp_path: Path):
    first, _ = store.prepare(small_shapes(), str(tmp_path / "out"))
    before = {name: os.stat(tmp_path / "out" / name) for name in files_of(tmp_path / "out")}
    second, written = store.prepare(small_shapes(), str(tmp_path / "out"))
    assert not written
    assert second == first
    assert {name: os.stat(tmp_path / "out" / name) for name in files_of(tmp_path / "out")} == before


def test_other_data_is_refused_and_the_stored_data_stay(tmp_path: Path):
    out = str(tmp_path / "out")
    store.prepare(small_shapes(), out)
    before = files_of(out)
    with pytest.raises(UserError, match=r"already holds another data set .*--overwrite"):
        store.prepare(small_shapes(seed=1), out)
    assert published(out) == before


def test_overwrite_replaces_the_data_set_and_nothing_else(tmp_path: Path):
    out = tmp_path / "out"
    store.prepare(small_shapes(), str(out))
    (out / "train-00007.parquet").write_bytes(b"of an older data set")
    strangers = {"notes.txt": b"mine", "train-mine.parquet": b"mine too"}
    for name, content in strangers.items():
        (out / name).write_bytes(content)
    manifest, written = store.prepare(small_shapes(seed=1), str(out), store.Preparation(overwrite=True))
    assert written
    assert read_manifest(str(out)) == manifest
    store.prepare(small_shapes(seed=1), str(tmp_path / "fresh"))
    assert files_of(out) == files_of(tmp_path / "fresh") | strangers


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_source_leaves_the_stored_data_set_intact(tmp_path: Path, overwrite: bool):
    out = str(tmp_path / "out")
    store.prepare(small_shapes(), out)
    before = files_of(out)
    with pytest.raises(UserError, match=r"broken\.png is no image"):
        store.prepare(failing(seed=1), out, store.Preparation(overwrite=overwrite))
    assert published(out) == before


def test_a_failing_source_leaves_no_data_set(tmp_path: Path):
    with pytest.raises(UserError, match=r"broken\.png"):
        store.prepare(failing(), str(tmp_path / "out"))
    assert published(tmp_path / "out") == {}
    with pytest.raises(UserError, match="is no data set"):
        read_manifest(str(tmp_path / "out"))


def test_skipped_images_are_counted_in_the_manifest(tmp_path: Path):
    skip = store.Preparation(skip_bad=True, max_bad_share=1)
    manifest, _ = store.prepare(failing(), str(tmp_path / "out"), skip)
    assert manifest.num_skipped == 1
    assert manifest.num_rows("test") == 19
    assert manifest.splits["test"]["num_rows_per_class"] == [2] * 9 + [1]
    assert read_manifest(str(tmp_path / "out")) == manifest


def gray(label: int, split: str, num: int = 2) -> list[sources.Item]:
    return [
        sources.Item(f"{split}/{label}/{i}.png", label, lambda i=i: np.full((8, 8, 3), i, np.uint8)) for i in range(num)
    ]


def test_a_class_may_be_missing_in_test_but_not_in_train(tmp_path: Path):
    items = {"train": [*gray(0, "train"), *gray(1, "train")], "test": gray(1, "test")}
    manifest, _ = store.prepare(sources.Source.of("gray", ["a", "b"], items), str(tmp_path / "out"))
    assert manifest.splits["test"]["num_rows_per_class"] == [0, 2]
    bad = [sources.Item("bad.png", 0, lambda: b"no image")]
    source = sources.Source.of("gray", ["a", "b"], {"train": [*bad, *gray(1, "train")], "test": gray(0, "test")})
    with pytest.raises(UserError, match=r"class 'a' has no usable images in the train split; add some or remove"):
        store.prepare(source, str(tmp_path / "none"), store.Preparation(skip_bad=True, max_bad_share=1))
    source = sources.Source.of("gray", ["a", "b"], {"train": [*gray(0, "train"), *gray(1, "train")], "test": bad})
    with pytest.raises(UserError, match=r"the test split has no usable images; add some, or leave the split out"):
        store.prepare(source, str(tmp_path / "none"), store.Preparation(skip_bad=True, max_bad_share=1))
    assert published(tmp_path / "none") == {}


def test_the_manifest_describes_the_files(shapes_uri: str):
    manifest = read_manifest(shapes_uri)
    assert (manifest.source, manifest.class_names, manifest.num_skipped) == ("shapes", sources.SHAPES, 0)
    assert (manifest.num_rows("train"), manifest.num_rows("test")) == (200, 100)
    for split in ("train", "test"):
        entry = manifest.splits[split]
        assert entry["encodings"] == ["PNG"]
        assert manifest.image_shape(split) == (32, 32)
        for file in entry["files"]:
            path = Path(shapes_uri) / file["name"]
            assert path.stat().st_size == file["num_bytes"]
            sha256 = subprocess.run(["sha256sum", path], check=True, capture_output=True, text=True).stdout.split()[0]
            assert sha256 == file["sha256"]
            assert pq.read_metadata(path).num_rows == file["num_rows"]


@pytest.mark.parametrize("axis", ["height", "width"])
def test_images_of_several_sizes_have_no_one_shape(tmp_path: Path, axis: str):
    def rectangle(side: int) -> np.ndarray:
        return np.zeros((side, 8, 3) if axis == "height" else (8, side, 3), np.uint8)

    items = [sources.Item(str(side), 0, partial(rectangle, side)) for side in (9, 8)]
    source = sources.Source.of("rectangles", ["a"], {"train": items, "test": items[:1]})
    manifest, _ = store.prepare(source, str(tmp_path / "out"))
    assert manifest.image_shape("train") is None
    assert manifest.image_shape("test") == ((9, 8) if axis == "height" else (8, 9))


def test_a_manifest_under_its_old_name_is_said_and_works_when_renamed(data: str):
    folder = Path(data)
    manifest = read_manifest(data)
    (folder / "_manifest.json").rename(folder / "manifest.json")
    before = files_of(folder)
    with pytest.raises(UserError, match=r"earlier version; rename its manifest\.json to _manifest\.json"):
        read_manifest(data)
    with pytest.raises(UserError, match=r"rename its manifest\.json .*, or prepare it again with --overwrite"):
        store.prepare(small_shapes(), data)
    assert files_of(folder) == before
    (folder / "manifest.json").rename(folder / "_manifest.json")
    assert read_manifest(data) == manifest


def test_an_old_manifest_goes_when_its_data_set_is_replaced_and_nobody_else_s(data: str, tmp_path: Path):
    folder, foreign = Path(data), tmp_path / "foreign"
    (folder / "_manifest.json").rename(folder / "manifest.json")
    store.prepare(small_shapes(), data, store.Preparation(overwrite=True))
    assert sorted(files_of(folder)) == FILES
    foreign.mkdir()
    for content in (b'{"name": "an app"}', b"[]", b"no JSON"):
        (foreign / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"is no data set: it has no _manifest\.json"):
            read_manifest(str(foreign))
        store.prepare(small_shapes(), str(foreign), store.Preparation(overwrite=True))
        assert (foreign / "manifest.json").read_bytes() == content
        (foreign / "_manifest.json").unlink()


def test_a_reader_of_the_whole_folder_finds_images_only(shapes_uri: str):
    """Arrow leaves out names that begin with an underscore, as Spark does, and other files if it is told to."""
    table = pyarrow.dataset.dataset(shapes_uri, format="parquet", exclude_invalid_files=True).to_table()
    assert table.num_rows == 300
    assert table.column_names == ["image", "label"]
    assert pyarrow.dataset.dataset([str(file) for file in Path(shapes_uri).glob("*.parquet")]).count_rows() == 300


def test_duckdb_reads_the_store(shapes_uri: str):
    found = duckdb.sql(
        f"select image.path, image.bytes, label from '{shapes_uri}/train-*.parquet' where label = 3 order by image.path"
    ).fetchall()
    expected = [row for row in rows(sources.shapes(200, 100)) if row.label == 3]
    assert found == [(row.path, row.encoded, row.label) for row in expected]


def test_the_store_is_in_the_hugging_face_layout(shapes_uri: str, tmp_path: Path):
    """Its own Parquet source reads it back: bytes, labels, paths and class names."""
    table = pq.read_table(f"{shapes_uri}/test-00000.parquet")
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert str(table.schema.field("label").type) == "int64"
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "ClassLabel", "names": sources.SHAPES}
    assert features["image"] == {"_type": "Image"}
    store.prepare(sources.find_source("parquet", shapes_uri), str(tmp_path / "copy"))
    assert files_of(tmp_path / "copy")["train-00000.parquet"] == files_of(shapes_uri)["train-00000.parquet"]


# The manifest


def change_manifest(folder: str, change: Callable[[dict[str, Any]], object], sealed: bool = False) -> None:
    """Edits _manifest.json; `sealed` makes its own checksum right again."""
    path = Path(folder) / "_manifest.json"
    values = json.loads(path.read_bytes())
    change(values)
    if sealed:
        values = seal(values)
    path.write_bytes(to_json(values))


def test_a_folder_without_a_manifest_is_no_data_set(data: str):
    (Path(data) / "_manifest.json").unlink()
    with pytest.raises(UserError, match=r"is no data set: it has no _manifest\.json; make one with jobs/prepare\.py"):
        read_manifest(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"format_version": 2}', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_refused(data: str, content: bytes):
    (Path(data) / "_manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*prepare the data set again") as caught:
        read_manifest(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", [0, 1, 3, "2"])
def test_another_format_version_is_refused(data: str, version: Any):
    change_manifest(data, lambda values: values.update(format_version=version))
    with pytest.raises(UserError, match=f"has format version {version}, this program reads 2"):
        read_manifest(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["class_names"].reverse(),
        lambda values: values["splits"]["train"].update(num_rows=199),
        lambda values: values["splits"]["test"]["files"][0].update(sha256="0" * 64),
        lambda values: values.update(num_skipped=1),
        lambda values: values.update(sha256=""),
    ],
)
def test_a_tampered_manifest_is_refused(data: str, change: Callable[[dict[str, Any]], object]):
    change_manifest(data, change)
    with pytest.raises(UserError, match="does not match its own checksum"):
        read_manifest(data)


def test_a_damaged_manifest_can_be_overwritten(tmp_path: Path):
    out = tmp_path / "out"
    store.prepare(small_shapes(), str(out))
    before = files_of(out)
    (out / "_manifest.json").write_bytes(b"{")
    with pytest.raises(UserError, match="is damaged"):
        store.prepare(small_shapes(), str(out))
    store.prepare(small_shapes(), str(out), store.Preparation(overwrite=True))
    assert files_of(out) == before


# Staging


def same_images(staged: StagedSplit, rows: list[Row]) -> bool:
    return (
        len(staged) == len(rows)
        and [staged.encoded(i).tobytes() for i in range(len(rows))] == [row.encoded for row in rows]
        and [staged.path(i) for i in range(len(rows))] == [row.path for row in rows]
        and staged.labels.tolist() == [row.label for row in rows]
    )


@pytest.fixture(scope="module")
def train_rows() -> list[Row]:
    return rows(sources.shapes(200, 100))


def test_the_staged_split_equals_the_source(shapes_uri: str, staging_folder: Path, train_rows: list[Row]):
    assert same_images(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train"), train_rows)
    assert len(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("test")) == 100
    left = {path.suffix for path in staging_folder.rglob("*") if path.is_file()}
    assert left == {".arrow", ".sha256", ".lock", ".holder"}  # no temporary file stays


def test_images_are_zero_copy_views_of_the_mapped_file(shapes_uri: str, staging_folder: Path):
    staged = DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "train.arrow" in line]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in maps]
    for i in (0, 17, 199):
        view = staged.encoded(i)
        assert any(low <= view.ctypes.data and view.ctypes.data + view.nbytes <= high for low, high in ranges)
        assert not view.flags.writeable
        assert ctypes.string_at(view.ctypes.data, 8) == b"\x89PNG\r\n\x1a\n"


def numbered(i: int) -> np.ndarray:
    return np.array([[[i >> 8, i & 255, 7]]], np.uint8)


def test_several_files_and_batches_are_one_split(tmp_path: Path, staging_folder: Path):
    count = parts.ROWS_PER_FILE + 1_050  # two files, twelve Arrow batches
    items = [sources.Item(f"{i}.png", i % 2, partial(numbered, i)) for i in range(count)]
    source = sources.Source.of("numbered", ["even", "odd"], {"train": items, "test": items[:2]})
    manifest, _ = store.prepare(source, str(tmp_path / "out"))
    assert [file["num_rows"] for file in manifest.splits["train"]["files"]] == [10_000, 1_050]
    staged = DataSet.open(str(tmp_path / "out"), Staging(folder=staging_folder)).stage("train")
    assert len(staged) == count
    assert (staged.labels == np.arange(count) % 2).all()
    for i in (0, 999, 1_000, 9_999, 10_000, 10_999, 11_000, count - 1):
        assert (np.asarray(Image.open(io.BytesIO(staged.encoded(i).tobytes()))) == numbered(i)).all()
        assert staged.path(i) == f"{i}.png"


@pytest.mark.parametrize("change", ["truncate", "flip", "no checksum", "delete"])
def test_a_damaged_staged_file_is_made_again(shapes_uri: str, staging_folder: Path, train_rows: list[Row], change: str):
    DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    (path,) = staging_folder.rglob("train.arrow")
    whole = path.read_bytes()
    damaged = {
        "truncate": whole[:-1],
        "flip": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "no checksum": b"half a file from another program",
        "delete": None,
    }[change]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    if change == "no checksum":
        path.with_name("train.arrow.sha256").unlink()
    assert same_images(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train"), train_rows)
    assert path.read_bytes() == whole


def files_checked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are held against the manifest from now on."""
    checked, has_rows = [], staged.has_rows

    def noted(path: Path, files: list[dict[str, Any]]) -> bool:
        checked.append(path)
        return has_rows(path, files)

    monkeypatch.setattr(staged, "has_rows", noted)
    return checked


def test_a_staged_file_is_checked_once_in_a_job_and_again_after_a_restart_or_a_change(
    shapes_uri: str, staging_folder: Path, train_rows: list[Row], monkeypatch: pytest.MonkeyPatch
):
    checked = files_checked(monkeypatch)

    def num_checks(job: str) -> int:
        """In a process of the job that stages and reads."""
        checked.clear()
        assert same_images(DataSet.open(shapes_uri, Staging(job=job, folder=staging_folder)).stage("train"), train_rows)
        return len(checked)

    def change_in_place() -> None:
        """One bit, with the file's size, inode and time of change as they were."""
        times = path.stat()
        with open(path, "r+b") as file:
            file.seek(5000)
            bit = file.read(1)[0] ^ 1
            file.seek(5000)
            file.write(bytes([bit]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    assert num_checks("one") == 0  # it was made, from files that were checked
    (path,) = staging_folder.rglob("train.arrow")
    seen = path.with_name("train.arrow.sha256")
    assert [num_checks("one"), num_checks("two"), num_checks("two"), num_checks(""), num_checks("")] == [0, 1, 0, 1, 1]
    num_checks("two")
    job, boot, rest = seen.read_text().split(" ", 2)
    seen.write_text(f"{job} {boot[::-1]} {rest}")  # as if the machine had been started anew
    assert [num_checks("two"), num_checks("two")] == [1, 0]
    whole = path.read_bytes()
    change_in_place()
    assert path.read_bytes() != whole
    num_checks("two")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"two", b"a" * (1 << 20)], ids=["no", "odd", "job", "long"])
def test_what_says_that_a_file_was_checked_may_be_anything(
    shapes_uri: str, staging_folder: Path, train_rows: list[Row], content: bytes
):
    DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    (path,) = staging_folder.rglob("train.arrow")
    path.with_name("train.arrow.sha256").write_bytes(content)
    assert same_images(DataSet.open(shapes_uri, Staging(job="two", folder=staging_folder)).stage("train"), train_rows)


def test_a_good_staged_file_is_used_without_the_store(data: str, staging_folder: Path, train_rows: list[Row]):
    manifest = read_manifest(data)
    DataSet.open(data, Staging(folder=staging_folder)).stage("train")
    shutil.rmtree(data)
    assert same_images(
        DataSet(uri=data, manifest=manifest, staging=Staging(folder=staging_folder)).stage("train"), train_rows
    )


def test_data_sets_do_not_share_staged_files(shapes_uri: str, tmp_path: Path, staging_folder: Path):
    store.prepare(small_shapes(), str(tmp_path / "other"))
    assert len(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")) == 200
    assert len(DataSet.open(str(tmp_path / "other"), Staging(folder=staging_folder)).stage("train")) == 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "named in the manifest but missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not match the manifest's checksum"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAt", 1)), "does not match the manifest"),
    ],
)
def test_a_changed_parquet_file_is_never_staged(
    data: str, staging_folder: Path, damage: Callable[[Path], object], message: str
):
    damage(Path(data) / "train-00000.parquet")
    with pytest.raises(UserError, match=rf"train-00000\.parquet.*{message}"):
        DataSet.open(data, Staging(folder=staging_folder)).stage("train")
    assert not list(staging_folder.rglob("train.arrow"))
    assert not list(staging_folder.rglob("*.part*"))


def test_a_manifest_that_counts_wrongly_is_noticed(data: str, staging_folder: Path):
    change_manifest(data, lambda values: values["splits"]["train"].update(num_rows=199), sealed=True)
    with pytest.raises(UserError, match="200 train rows were found, the manifest says 199"):
        DataSet.open(data, Staging(folder=staging_folder)).stage("train")


def test_labels_beyond_the_classes_are_noticed(data: str, staging_folder: Path):
    def change(values: dict) -> None:
        values["class_names"].pop()
        for split in values["splits"].values():
            split["num_rows_per_class"].pop()

    change_manifest(data, change, sealed=True)
    with pytest.raises(UserError, match="labels outside 0 to 8"):
        DataSet.open(data, Staging(folder=staging_folder)).stage("train")


def test_no_place_to_stage_is_said_in_one_sentence(shapes_uri: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot make the folder .*--staging-folder") as caught:
        DataSet.open(shapes_uri, Staging(folder=tmp_path / "file" / "below")).stage("train")
    assert "\n" not in str(caught.value)


# Processes


def stage_in_child(uri: str, folder: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    staged = DataSet.open(uri, Staging(folder=folder)).stage("train")
    (path,) = folder.rglob("train.arrow")
    images = b"".join(staged.encoded(i).tobytes() for i in range(len(staged)))
    results.put((path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(images).hexdigest()))


def make_and_note(log: Path, path: Path) -> None:
    with open(log, "a") as file:
        file.write("made\n")
    path.write_bytes(b"x" * (8 << 20))


def make_in_child(path: Path, log: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(once_per_node(path, partial(make_and_note, log), is_right=lambda _: True).stat().st_size)


def run_together(target: Callable[..., None], *args: Any, count: int = 3) -> list[Any]:
    """Starts `count` processes that begin at the same moment; returns what they put into the queue."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cifar_dist.data.store"])  # imported once for all of them
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=target, args=(*args, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count
    return found


def test_processes_that_stage_together_share_one_file(shapes_uri: str, staging_folder: Path, train_rows: list[Row]):
    found = run_together(stage_in_child, shapes_uri, staging_folder)
    assert len(set(found)) == 1
    assert found[0][-1] == hashlib.sha256(b"".join(row.encoded for row in train_rows)).hexdigest()


def test_only_one_process_makes_the_file(tmp_path: Path):
    sizes = run_together(make_in_child, tmp_path / "file", tmp_path / "log")
    assert sizes == [8 << 20] * 3
    assert (tmp_path / "log").read_text() == "made\n"


KILLED_WHILE_STAGING = """
import os, signal, sys
from pathlib import Path
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.private import Staging, once_per_node
from cifar_dist.data.sources.source import ItemReader
from cifar_dist.data.staged import DataSet, copy_split

def half(path):
    copy_split(sys.argv[1], "train", read_manifest(sys.argv[1]), path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

area = DataSet.open(sys.argv[1], Staging(folder=sys.argv[2])).area
once_per_node(area / "train.arrow", half, is_right=lambda _: True)
"""

KILLED_WHILE_PREPARING = """
import os, signal, sys
from cifar_dist.data import sources, store

source = sources.shapes(20, 20, seed=1)
source.reader.items[-1] = sources.Item("killer", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
store.prepare(source, sys.argv[1], store.Preparation(overwrite=True))
"""


# No signal from outside can be aimed at this moment: the move itself kills.
KILLED_WHILE_MOVING = """
import os, signal, sys
from cifar_dist.data import sources, store

move, left = store.Folder.move, int(sys.argv[2])

def move_or_die(*names):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(*names)

store.Folder.move = move_or_die
store.prepare(sources.shapes(20, 20, seed=1), sys.argv[1], store.Preparation(overwrite=True))
"""


def run_until_killed(code: str, *args: str) -> None:
    done = subprocess.run([sys.executable, "-c", code, *args], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_staging_goes_on_after_a_process_was_killed_half_way(
    shapes_uri: str, staging_folder: Path, train_rows: list[Row]
):
    run_until_killed(KILLED_WHILE_STAGING, shapes_uri, str(staging_folder))
    (part,) = staging_folder.rglob("train.arrow.part-*")
    assert part.stat().st_size > 0
    assert not list(staging_folder.rglob("train.arrow"))
    assert same_images(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train"), train_rows)
    assert not list(staging_folder.rglob("*.part-*"))


def test_a_data_set_outlives_a_process_killed_while_replacing_it(tmp_path: Path):
    out = tmp_path / "out"
    store.prepare(small_shapes(), str(out))
    before = files_of(out)
    run_until_killed(KILLED_WHILE_PREPARING, str(out))
    assert len(list((out / store.PREPARING).glob("part-*.parquet"))) == 1  # it was killed half-way
    assert published(out) == before
    assert not store.prepare(small_shapes(), str(out))[1]
    assert published(out) == before


@pytest.mark.parametrize(
    ("is_replaced", "num_moves"), [(False, None), (False, 0), (False, 1), (True, None), (True, 0), (True, 1), (True, 2)]
)
def test_a_write_that_was_killed_is_no_data_set(tmp_path: Path, num_moves: int | None, is_replaced: bool):
    out = tmp_path / "out"
    if is_replaced:  # its manifest must not name the new files
        store.prepare(small_shapes(seed=2), str(out))
    before = files_of(out) if is_replaced else {}
    if num_moves is None:
        run_until_killed(KILLED_WHILE_PREPARING, str(out))
    else:
        run_until_killed(KILLED_WHILE_MOVING, str(out), str(num_moves))
    if is_replaced and not num_moves:  # nothing of it was touched yet
        assert {name: content for name, content in files_of(out).items() if not name.startswith(".")} == before
        assert read_manifest(str(out))
    else:
        with pytest.raises(UserError, match="is no data set"):
            read_manifest(str(out))
    store.prepare(small_shapes(), str(out), store.Preparation(overwrite=is_replaced and not num_moves))
    store.prepare(small_shapes(), str(tmp_path / "fresh"))
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize(("num_done", "num_kept"), [(3, 0), (23, 1)])
def test_ctrl_c_leaves_what_is_complete_for_the_next_start_only(tmp_path: Path, num_done: int, num_kept: int):
    def stop(done: int, _bad: int) -> None:
        if done == num_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.prepare(small_shapes(), str(tmp_path / "out"), store.Preparation(show=stop))
    assert published(tmp_path / "out") == {}
    names = [name.rpartition(".")[2] for name in files_of(tmp_path / "out")]
    assert sorted(names) == sorted(["parquet", "facts", "json"] * num_kept)


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_preparing_again_mends_a_damaged_file(harm: str, tmp_path: Path) -> None:
    prepare = partial(store.prepare, sources.shapes(20, 20), str(tmp_path / "data"))
    _, written = prepare()
    assert written
    file = tmp_path / "data" / "train-00000.parquet"
    good = file.read_bytes()
    file.write_bytes(good[:-1]) if harm == "truncate" else file.unlink()
    _, written = prepare()
    assert written
    assert file.read_bytes() == good


def test_a_damaged_manifest_is_replaced_with_overwrite_only(tmp_path: Path) -> None:
    prepare = partial(store.prepare, sources.shapes(20, 20), str(tmp_path / "data"))
    prepare()
    manifest = tmp_path / "data" / "_manifest.json"
    good = manifest.read_bytes()
    manifest.write_bytes(good[:-9])
    with pytest.raises(UserError, match=r"is damaged .* with --overwrite"):
        prepare()
    prepare(store.Preparation(overwrite=True))
    assert manifest.read_bytes() == good


# What is not ours


@pytest.mark.parametrize(
    "name",
    ["train-00000.parquet", "validation-00003.parquet", "test-00000.parquet", "data_card.json", "_left_out.jsonl"],
)
def test_a_file_that_no_manifest_names_is_replaced_with_overwrite_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"somebody's own")
    with pytest.raises(UserError, match=rf"{name} is in the way: no data set of this program names it"):
        store.prepare(small_shapes(), str(tmp_path))
    assert files_of(tmp_path) == {name: b"somebody's own"}
    store.prepare(small_shapes(), str(tmp_path), store.Preparation(overwrite=True))
    assert sorted(files_of(tmp_path)) == FILES


def test_a_file_beside_a_data_set_that_its_manifest_does_not_name_stays(data: str) -> None:
    """A shard from elsewhere, put beside ours."""
    (Path(data) / "train-00007.parquet").write_bytes(b"somebody's own")
    before = files_of(Path(data))
    with pytest.raises(UserError, match=r"train-00007\.parquet is in the way"):
        store.prepare(small_shapes(), data)
    assert files_of(Path(data)) == before


def test_other_files_of_a_folder_stay_with_overwrite_too(tmp_path: Path) -> None:
    mine = {"train.parquet": b"1", "train-1.parquet": b"2", "notes.txt": b"3", "sub/train-00000.parquet": b"4"}
    (tmp_path / "sub").mkdir()
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    store.prepare(small_shapes(), str(tmp_path), store.Preparation(overwrite=True))
    assert mine.items() <= files_of(tmp_path).items()


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.parquet.bak.txt", "inner/train-00000.parquet"])
def test_what_lies_in_the_folder_for_unfinished_data_is_not_deleted_if_it_is_not_ours(tmp_path: Path, name: str):
    file = tmp_path / store.PREPARING / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"somebody's own")
    with pytest.raises(UserError, match="is in the way: this program did not write it"):
        store.prepare(small_shapes(), str(tmp_path), store.Preparation(overwrite=True))
    assert file.read_bytes() == b"somebody's own"


def test_what_was_not_moved_by_a_killed_prepare_stays(tmp_path: Path) -> None:
    """A file of such a name that came there after the kill is not taken for one that was moved."""
    run_until_killed(KILLED_WHILE_MOVING, str(tmp_path), "0")
    (tmp_path / "train-00000.parquet").write_bytes(b"somebody's own")
    with pytest.raises(UserError, match=r"train-00000\.parquet is in the way"):
        store.prepare(small_shapes(), str(tmp_path))
    assert files_of(tmp_path) == {"train-00000.parquet": b"somebody's own"}


# Two at once


def test_a_prepare_that_another_one_has_overtaken_changes_nothing(tmp_path: Path) -> None:
    """The second one takes what the first one has begun for what a killed one has left."""
    out = tmp_path / "out"

    def overtaken(num_done: int, _bad: int) -> None:
        if num_done == 40 and not (out / "_manifest.json").exists():
            store.prepare(small_shapes(), str(out))

    with pytest.raises(UserError, match=r"meanwhile|another job"):
        store.prepare(small_shapes(seed=1), str(out), store.Preparation(show=overtaken))
    store.prepare(small_shapes(), str(tmp_path / "fresh"))
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_a_prepare_does_not_remove_what_another_one_has_begun(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def replaced(num_done: int, _bad: int) -> None:
        if num_done == 40 and not (out / store.PREPARING / "start-01234567").exists():
            shutil.rmtree(out / store.PREPARING)
            (out / store.PREPARING).mkdir()
            (out / store.PREPARING / "start-01234567").write_bytes(b"")

    with pytest.raises(UserError, match=r"meanwhile|another job"):
        store.prepare(small_shapes(seed=1), str(out), store.Preparation(show=replaced))
    assert f"{store.PREPARING}/start-01234567" in files_of(out)
    assert published(out) == {}
