"""Storage: local paths and S3 URIs through the same code; a real S3-protocol server answers on loopback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from cifar_dist.data import sources, store
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder, absolute_uri, file_sha256, join_uri, open_uri, to_json

ROOT = Path(__file__).parents[2]
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc", from FIPS 180


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The query of a URI such as s3://bucket/prefix; the bucket is there."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        address = {"endpoint_override": f"{host}:{port}", "scheme": "http", "region": "us-east-1"}
        fs.S3FileSystem(**address, allow_bucket_creation=True).create_dir("bucket")
        yield "?" + "&".join(f"{name}={value}" for name, value in address.items())
    server.stop()


@pytest.fixture(params=["path", "file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a local path, a file:// URI, an S3 URI."""
    if request.param == "s3":
        return f"s3://bucket/{tmp_path.name}{request.getfixturevalue('s3')}"
    return f"file://{tmp_path}/place" if request.param == "file" else str(tmp_path / "place")


# URIs


def test_local_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute_uri("data/../out") == str(tmp_path / "out")
    assert absolute_uri("~/out") == str(tmp_path / "home" / "out")
    assert absolute_uri("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize(
    ("uri", "parts", "expected"),
    [
        ("/data", ["a", "b.json"], "/data/a/b.json"),
        ("/data/", ["a"], "/data/a"),
        ("/odd?name", ["a"], "/odd?name/a"),
        ("s3://bucket/x", ["a"], "s3://bucket/x/a"),
        ("s3://bucket/x/?region=r&scheme=http", ["a", "b"], "s3://bucket/x/a/b?region=r&scheme=http"),
    ],
)
def test_parts_are_joined_in_front_of_the_query(uri: str, parts: list[str], expected: str):
    assert join_uri(uri, *parts) == expected


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "an empty path or URI"),
        ("foo://bucket/x", "cannot open the URI foo://bucket/x"),
        ("s3://bucket/x?mistake=1", "cannot open the URI"),
        ("s3://key:hidden@bucket/x", "holds credentials"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_refused(uri: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        open_uri(uri)
    assert "hidden" not in str(caught.value)


# Folders


def test_what_is_written_is_read(uri: str, tmp_path: Path):
    folder = Folder(uri)
    assert folder.names() == []
    assert not folder.exists("b")
    folder.create("sub")
    folder.write("b", b"abc")
    folder.write("a", b"first")
    folder.write("a", b"second")
    folder.write("sub/c", b"")
    assert folder.names() == ["a", "b", "sub"]  # no temporary name among them
    assert folder.names("sub") == ["c"]
    assert folder.exists("b")
    assert (folder.read("a"), folder.read("sub/c")) == (b"second", b"")
    assert folder.download("b", tmp_path / "copy") == ABC
    assert (tmp_path / "copy").read_bytes() == b"abc"
    assert file_sha256(tmp_path / "copy") == ABC


def test_move_upload_and_delete(uri: str, tmp_path: Path):
    folder = Folder(uri)
    folder.create("sub")
    (tmp_path / "local").write_bytes(b"abc" * 2_000_000)  # more than one chunk
    folder.upload(tmp_path / "local", "sub/up")
    folder.move("sub/up", "moved")
    assert folder.read("moved") == (tmp_path / "local").read_bytes()
    assert folder.download("moved", tmp_path / "copy") == file_sha256(tmp_path / "local")
    assert not folder.exists("sub/up")
    folder.write("sub/x", b"1")
    folder.delete("sub")
    folder.delete("moved")
    folder.delete("never there")
    assert folder.names() == []


def test_a_missing_file_is_not_a_user_error_yet(uri: str, tmp_path: Path):
    """Callers know what a missing file means and say it."""
    for act in (lambda: Folder(uri).read("x"), lambda: Folder(uri).download("x", tmp_path / "copy")):
        with pytest.raises(FileNotFoundError):
            act()


def test_storage_faults_name_the_file_and_the_act(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    folder = Folder(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot create .*/file/below"):
        folder.create("below")
    with pytest.raises(UserError, match=r"cannot list .*/file"):
        folder.names()


def test_a_missing_bucket_is_named(s3: str):
    with pytest.raises(UserError, match=r"cannot write s3://nobucket/x/a.*nobucket"):
        Folder(f"s3://nobucket/x{s3}").write("a", b"")


@pytest.mark.parametrize("value", [{"b": 1, "a": [1.5, None]}, {"a": [1.5, None], "b": 1}])
def test_equal_values_give_equal_json(value: dict):
    assert to_json(value) == b'{\n  "a": [\n    1.5,\n    null\n  ],\n  "b": 1\n}\n'


# A data set on each kind of storage


def test_a_data_set_is_the_same_on_every_storage(uri: str, shapes_uri: str, staging_folder: Path):
    manifest, written = store.prepare(sources.shapes(200, 100), uri)
    assert written
    assert manifest == store.read_manifest(uri) == store.read_manifest(shapes_uri)
    names = ["manifest.json", "test-00000.parquet", "train-00000.parquet"]
    assert Folder(uri).names() == Folder(shapes_uri).names() == names
    for name in names:
        assert Folder(uri).read(name) == Folder(shapes_uri).read(name)
    staged = store.stage(uri, "train", staging_folder)
    assert staged.encoded(7).tobytes() == list(sources.shapes(200, 100).rows("train"))[7].encoded
    assert not store.prepare(sources.shapes(200, 100), uri)[1]


def test_a_data_set_in_a_bucket_is_protected_and_replaced(s3: str, staging_folder: Path):
    uri = f"s3://bucket/replaced{s3}"
    store.prepare(sources.shapes(20, 20), uri)
    with pytest.raises(UserError, match="already holds another data set"):
        store.prepare(sources.shapes(20, 20, seed=1), uri)
    assert len(store.stage(uri, "test", staging_folder)) == 20
    manifest, _ = store.prepare(sources.shapes(30, 20, seed=1), uri, overwrite=True)
    assert Folder(uri).names() == ["manifest.json", "test-00000.parquet", "train-00000.parquet"]
    assert len(store.stage(uri, "train", staging_folder, manifest)) == 30


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_fault_in_a_bucket_is_named_by_its_uri(s3: str, staging_folder: Path, fault: str):
    uri = f"s3://bucket/{fault}{s3}"
    store.prepare(sources.shapes(20, 20), uri)
    if fault == "missing":
        Folder(uri).delete("train-00000.parquet")
    else:
        Folder(uri).write("train-00000.parquet", Folder(uri).read("train-00000.parquet")[:-1])
    message = "missing" if fault == "missing" else "does not match the manifest's checksum"
    with pytest.raises(UserError, match=rf"s3://bucket/{fault}/train-00000\.parquet\?.*{message}"):
        store.stage(uri, "train", staging_folder)


@pytest.mark.parametrize("below", ["", "/data"])
def test_a_parquet_source_in_a_bucket(s3: str, tmp_path: Path, below: str):
    store.prepare(sources.shapes(20, 20), f"s3://bucket/source{below.replace('/', '-')}{below}{s3}")
    source = sources.parquet(f"s3://bucket/source{below.replace('/', '-')}{s3}")
    assert source.class_names == sources.SHAPES
    manifest, _ = store.prepare(source, str(tmp_path / "out"))
    assert (manifest.num_rows("train"), manifest.num_rows("test")) == (20, 20)


def test_the_prepare_job_writes_to_a_bucket(s3: str):
    uri = f"s3://bucket/job{s3}"
    done = subprocess.run(
        [sys.executable, "jobs/prepare.py", "--source", "shapes", "--num-train=20", "--num-test=20", "--out", uri],
        cwd=ROOT,
        env={**os.environ, **CREDENTIALS},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "20 train, 20 test images of 10 classes; prepared" in done.stdout
    assert store.read_manifest(uri).num_rows("train") == 20
