"""Storage: local paths and S3 URIs through the same code; a real S3-protocol server answers on loopback.

Faults that may pass are tried again, others are told at once; they are real ones, of the kernel and of servers.
"""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from prepared import rows

from cifar_dist.data import sources, store
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.run import checkpoint, checkpoints
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.sealed_json import to_json
from cifar_dist.storage import Folder, file_sha256, may_pass
from cifar_dist.uris import absolute_uri, join_uri, lies_in, open_uri, output_uri

ROOT = Path(__file__).parents[2]
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of b"abc", from FIPS 180


@pytest.fixture(params=["path", "file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place: a local path, a file:// URI, an S3 URI."""
    if request.param == "s3":
        return f"s3://bucket/{uuid.uuid4().hex}{request.getfixturevalue('s3')}"
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


# Faults that pass by themselves, and others


@pytest.mark.parametrize("code", ["EIO", "EAGAIN", "EBUSY", "ESTALE", "ETIMEDOUT", "ECONNREFUSED", "ECONNRESET"])
def test_a_fault_of_a_file_server_that_is_away_may_pass(code: str):
    assert may_pass(OSError(getattr(errno, code), os.strerror(getattr(errno, code))))


@pytest.mark.parametrize(
    "code", ["ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EISDIR", "ENOTDIR", "ELOOP"]
)
def test_a_full_disk_or_a_denied_access_does_not_pass(code: str):
    assert not may_pass(OSError(getattr(errno, code), os.strerror(getattr(errno, code))))


# Bucket -> what a server answers to every request for it: (status, S3's error code). 0 hangs up. Proxies send no code,
# nor does any server that is asked for an object's head.
ANSWERS = {
    "slow-down": (503, "SlowDown"),
    "service-unavailable": (503, "ServiceUnavailable"),
    "internal-error": (500, "InternalError"),
    "request-timeout": (400, "RequestTimeout"),
    "throttling": (400, "Throttling"),
    "hang-up": (0, ""),
    "status-429": (429, ""),
    "status-500": (500, ""),
    "status-502": (502, ""),
    "status-503": (503, ""),
    "status-504": (504, ""),
    "access-denied": (403, "AccessDenied"),
    "invalid-key": (403, "InvalidAccessKeyId"),
    "bad-signature": (403, "SignatureDoesNotMatch"),
    "expired-token": (400, "ExpiredToken"),
    "no-such-bucket": (404, "NoSuchBucket"),
}
REFUSALS = ["access-denied", "invalid-key", "bad-signature", "expired-token", "no-such-bucket"]
CODELESS: tuple = ()


class FaultyServer(BaseHTTPRequestHandler):
    """An object store that is not well."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, code = ANSWERS[self.path.lstrip("/").replace("?", "/").split("/")[0]]
        if not status:
            self.close_connection = True
            return
        body = f"<Error><Code>{code}</Code><Message>said so</Message></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def faults(s3: str) -> Iterator[dict[tuple[str, str], OSError]]:
    """(bucket, act) -> pyarrow's error. All at once: it tries again for 6 seconds by itself."""
    assert s3  # for the credentials
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    # One for all: pyarrow opens none while another one is busy.
    query = f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    system, _ = open_uri(f"s3://any{query}")

    def fault_of(key: tuple[str, str]) -> OSError:
        bucket, act = key
        open_stream = system.open_output_stream if act == "write" else system.open_input_stream
        with pytest.raises(OSError, match=bucket) as caught:
            open_stream(f"{bucket}/x").close()
        return caught.value

    keys = [(bucket, act) for bucket in ANSWERS for act in ("write", "read")]
    with ThreadPoolExecutor(len(keys)) as pool:
        found = dict(zip(keys, pool.map(fault_of, keys), strict=True))
    yield found
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("bucket", "act"),
    [
        ("slow-down", "write"),
        ("service-unavailable", "write"),
        ("internal-error", "write"),
        ("request-timeout", "write"),
        ("hang-up", "write"),
        ("hang-up", "read"),
        pytest.param("throttling", "write", marks=CODELESS),
        pytest.param("slow-down", "read", marks=CODELESS),
        pytest.param("service-unavailable", "read", marks=CODELESS),
        pytest.param("internal-error", "read", marks=CODELESS),
        *(
            pytest.param(f"status-{status}", act, marks=CODELESS)
            for status in (429, 500, 502, 503, 504)
            for act in ("write", "read")
        ),
    ],
)
def test_the_answer_of_an_overloaded_object_store_may_pass(faults, bucket: str, act: str):
    assert may_pass(faults[bucket, act]), str(faults[bucket, act])


@pytest.mark.parametrize("bucket", REFUSALS)
@pytest.mark.parametrize("act", ["write", "read"])
def test_the_refusal_of_an_object_store_does_not_pass(faults, bucket: str, act: str):
    assert not may_pass(faults[bucket, act]), str(faults[bucket, act])


def test_a_server_that_comes_back_is_waited_for(s3: str, capfd: pytest.CaptureFixture[str]):
    """With `retry_seconds`; without them the fault is told, with the file and what was to be done with it."""
    assert s3  # for the credentials
    place = socket.socket()
    place.bind(("127.0.0.1", 0))  # not listening: connections are refused, and nobody else takes the port
    port = place.getsockname()[1]
    uri = f"s3://late/run?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    hastily, patiently = Folder(uri), Folder(uri, retry_seconds=300)
    with ThreadPoolExecutor(4) as pool:
        hasty, hasty_reader = pool.submit(hastily.write, "a.json", b"abc"), pool.submit(hastily.read, "a.json")
        patient, patient_reader = pool.submit(patiently.create), pool.submit(patiently.names)
        with pytest.raises(UserError, match=r"cannot write s3://late/run/a\.json\?.*NETWORK_CONNECTION") as error:
            hasty.result(120)
        assert "tried again" not in str(error.value)
        with pytest.raises(UserError, match=r"cannot read s3://late/run/a\.json\?.*NETWORK_CONNECTION"):
            hasty_reader.result(120)
        said = ""
        while not ("cannot create s3:" in said and "cannot list s3:" in said):
            assert not patient.done()
            assert not patient_reader.done()
            time.sleep(0.1)
            said += capfd.readouterr().err
        assert said.count("; trying again\n") == said.count("cannot ") >= 2
        place.close()
        server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        server.start()
        patient.result(120)
        assert patient_reader.result(120) == []
    hastily.write("a.json", b"abc")
    assert hastily.read("a.json") == b"abc"
    server.stop()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_fault_that_does_not_pass_in_time_is_told_in_the_end(capfd: pytest.CaptureFixture[str]):
    """The kernel answers EIO to whoever reads memory where there is none."""
    folder = Folder("/proc/self", retry_seconds=0.7)
    with pytest.raises(UserError, match=r"cannot read /proc/self/mem: .*run the same command again later"):
        folder.read("mem")
    assert capfd.readouterr().err.count("cannot read /proc/self/mem: ") == 2
    with pytest.raises(UserError, match=r"cannot read /proc/self/mem: ") as error:
        Folder("/proc/self").read("mem")
    assert "tried again" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_what_will_not_pass_is_not_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = Folder(str(tmp_path), retry_seconds=300)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError):
        folder.read("not there")
    for act in (
        lambda: folder.create("file/below"),
        lambda: folder.write("folder", b""),
        lambda: folder.read("folder"),
    ):
        with pytest.raises(UserError, match=r"cannot \w+ "):
            act()
    assert capfd.readouterr().err == ""


# A local disk that is full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = Folder(str(tmp_path), retry_seconds=300)
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "some").write_bytes(b"abc" * 100_000)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/full: .*No space left on device"):
        folder.upload(tmp_path / "some", "full")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/full on this machine: .*No space left"):
        folder.download("some", tmp_path / "full")
    assert capfd.readouterr().err == ""


FULL_DISK = """
import sys
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder

folder = Folder(sys.argv[1], retry_seconds=300)
folder.write("kept", b"before")
for name in ("kept", "new"):
    try:
        folder.write(name, b"x" * 1_000_000)
        print("written")
    except UserError as error:
        print(error)
print(folder.names(), folder.read("kept"))
folder.write("new", b"x" * 100_000)
print(folder.names())
"""


def test_a_write_to_a_full_disk_leaves_what_was_there(tmp_path: Path):
    """A small file system of its own, in a mount namespace that ends with the process."""
    isolated = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
    mount = f"mount -t tmpfs -o size=256k none {tmp_path}"
    if not shutil.which("unshare") or subprocess.run([*isolated, mount], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    command = f'{mount} && exec "$0" -c "$1" {tmp_path}'
    done = subprocess.run([*isolated, command, sys.executable, FULL_DISK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *refused, left, after = done.stdout.splitlines()
    reason = "[Errno 28] No space left on device"
    advice = "make room, then run the same command to go on"
    assert refused == [f"cannot write {tmp_path}/{name}: {reason}; {advice}" for name in ("kept", "new")]
    assert left == "['kept'] b'before'"  # neither a part nor a temporary name
    assert after == "['kept', 'new']"  # what the failed ones took is free again


@pytest.mark.parametrize("name", ["kept", "new"])
def test_a_write_that_fails_midway_leaves_what_was_there(tmp_path: Path, name: str):
    """At a limit on the size of files."""
    folder = Folder(str(tmp_path))
    folder.write("kept", b"before")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}/{name}: .*File too large"):
            folder.write(name, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert folder.names() == ["kept"]
    assert folder.read("kept") == b"before"


def test_a_write_that_fails_at_the_end_leaves_no_temporary_name(tmp_path: Path):
    """The name is taken by a folder: the rename is refused."""
    folder = Folder(str(tmp_path))
    folder.create("taken")
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/taken: "):
        folder.write("taken", b"abc")
    assert folder.names() == ["taken"]


# Several processes at the same folder


def at_once(*acts: Callable[[], object]) -> list[BaseException | None]:
    """What each of them raised."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> BaseException | None:
        barrier.wait()
        try:
            act()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns after microseconds, so that each order of their steps comes up in some round."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switched")
def test_a_folder_can_be_listed_while_it_is_being_created(tmp_path: Path):
    folder = Folder(str(tmp_path))
    names = [f"folder-{number}" for number in range(1000)]
    raised = [at_once(lambda: folder.names(name), lambda: folder.create(name)) for name in names]  # noqa: B023
    assert [errors for errors in raised if any(errors)] == []


@pytest.mark.usefixtures("often_switched")
def test_a_folder_can_be_deleted_by_two_at_once(tmp_path: Path):
    """What is not there is fine."""
    folder, raised = Folder(str(tmp_path)), []
    for number in range(200):
        (tmp_path / "folder").mkdir()
        for file in "abcdefgh":
            (tmp_path / "folder" / file).write_text(str(number))
        raised += at_once(*[lambda: folder.delete("folder")] * 2)
        assert folder.names() == []
    assert [error for error in raised if error] == []


@pytest.mark.usefixtures("often_switched")
def test_a_reader_sees_the_old_file_or_the_new_one(uri: str):
    folder = Folder(uri)
    folder.create()
    contents = [bytes([65 + number]) * 200_000 for number in range(12)]
    folder.write("file", contents[0])
    seen: list[bytes] = []
    reading = threading.Event()

    def read() -> None:
        while not reading.is_set():
            seen.append(folder.read("file"))

    def write() -> None:
        for content in contents:
            folder.write("file", content)
        reading.set()

    assert at_once(read, write) == [None, None]
    assert seen
    assert set(seen) <= set(contents)


# A data set on each kind of storage


def test_a_data_set_is_the_same_on_every_storage(uri: str, shapes_uri: str, staging_folder: Path):
    manifest, written = store.prepare(sources.shapes(200, 100), uri)
    assert written
    assert manifest == read_manifest(uri) == read_manifest(shapes_uri)
    names = ["_manifest.json", "data_card.json", "test-00000.parquet", "train-00000.parquet"]
    assert Folder(uri).names() == Folder(shapes_uri).names() == names
    for name in names:
        assert Folder(uri).read(name) == Folder(shapes_uri).read(name)
    staged = DataSet.open(uri, Staging(folder=staging_folder)).stage("train")
    assert staged.encoded(7).tobytes() == rows(sources.shapes(200, 100))[7].encoded
    assert not store.prepare(sources.shapes(200, 100), uri)[1]


def test_a_data_set_in_a_bucket_is_protected_and_replaced(s3: str, staging_folder: Path):
    uri = f"s3://bucket/replaced{s3}"
    store.prepare(sources.shapes(20, 20), uri)
    with pytest.raises(UserError, match="already holds another data set"):
        store.prepare(sources.shapes(20, 20, seed=1), uri)
    assert len(DataSet.open(uri, Staging(folder=staging_folder)).stage("test")) == 20
    manifest, _ = store.prepare(sources.shapes(30, 20, seed=1), uri, store.Preparation(overwrite=True))
    assert Folder(uri).names() == ["_manifest.json", "data_card.json", "test-00000.parquet", "train-00000.parquet"]
    assert len(DataSet(uri=uri, manifest=manifest, staging=Staging(folder=staging_folder)).stage("train")) == 30


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
        DataSet.open(uri, Staging(folder=staging_folder)).stage("train")


@pytest.mark.parametrize("below", ["", "/data"])
def test_a_parquet_source_in_a_bucket(s3: str, tmp_path: Path, below: str):
    store.prepare(sources.shapes(20, 20), f"s3://bucket/source{below.replace('/', '-')}{below}{s3}")
    source = sources.find_source("parquet", f"s3://bucket/source{below.replace('/', '-')}{s3}")
    assert source.class_names == sources.SHAPES
    manifest, _ = store.prepare(source, str(tmp_path / "out"))
    assert (manifest.num_rows("train"), manifest.num_rows("test")) == (20, 20)


def test_the_prepare_job_writes_to_a_bucket(s3: str):
    uri = f"s3://bucket/job{s3}"
    done = subprocess.run(
        [sys.executable, "jobs/prepare.py", "--source", "shapes", "--num-train=20", "--num-test=20", "--out", uri],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "20 train, 20 test images of 10 classes; prepared" in done.stdout
    assert read_manifest(uri).num_rows("train") == 20


def test_a_full_temporary_folder_is_not_blamed_on_the_object_store(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_files", fail)
    run = Checkpoints(s3_uri)
    with pytest.raises(UserError, match=r"on this machine: .*No space left.*TMPDIR") as error:
        run.write(
            checkpoint.Cursor(0, 1),
            1,
            checkpoint.CheckpointState(model={}, average=None, ranks={}, optimizer={}),
            {"model": "fan"},
        )
    assert "s3://" not in str(error.value)
    assert run.folder.names() == []


@pytest.mark.parametrize("name", ["demo", "deep/demo", "."])
def test_what_is_written_does_not_go_where_ray_unpacks_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    upload = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    upload.mkdir(parents=True)
    monkeypatch.chdir(upload)
    with pytest.raises(UserError, match=rf"--out {name} lies in the folder that Ray unpacks a submitted job into"):
        output_uri(name, "--out")
    (tmp_path / "link").symlink_to(upload)
    with pytest.raises(UserError, match="--storage"):
        output_uri(f"{tmp_path}/link/{name}", "--storage")
    assert output_uri(f"{tmp_path}/{name}", "--out") == str((tmp_path / name).absolute())
    assert output_uri("s3://bucket/demo", "--out") == "s3://bucket/demo"


@pytest.mark.parametrize(
    ("inner", "outer", "lies"),
    [
        *(("a", "a", True), ("a/b", "a", True), ("a", "a/b", False), ("ab", "a", False), ("a/../c", "a", False)),
        *(("link", "a", True), ("link/b", "a", True), ("a/b", "link", True), ("link", "c", False)),
    ],
)
def test_a_folder_lies_in_another_by_way_of_links_too(tmp_path: Path, inner: str, outer: str, lies: bool) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert lies_in(f"{tmp_path}/{inner}", f"{tmp_path}/{outer}") is lies


def test_folders_of_different_storage_do_not_lie_in_each_other(s3_uri: str, tmp_path: Path) -> None:
    assert not lies_in(s3_uri, str(tmp_path))
    assert lies_in(join_uri(s3_uri, "inner"), s3_uri)
