"""Checkpoints: what is written comes back, what is damaged or foreign is refused by its path, the right ones stay."""

import hashlib
import importlib.metadata
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from moto.server import ThreadedMotoServer

from cifar_dist.errors import UserError
from cifar_dist.train.checkpoint import Checkpoint, Checkpoints, Cursor


def weights(value: float) -> dict[str, torch.Tensor]:
    # A transposed and a scalar tensor: neither lies in memory as safetensors wants it.
    return {"a.weight": torch.arange(6.0).view(2, 3).T + value, "a.steps": torch.tensor(value, dtype=torch.float64)}


def optimizer_state() -> dict:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    return {"optimizers": [optimizer.state_dict()], "scaler": {"scale": 8.0}}


def write(checkpoints: Checkpoints, epoch: int, step: int = 0, score: tuple | None = None, average=None) -> Checkpoint:
    metrics = score and {"validation_accuracy": score[0], "validation_loss": score[1]}
    meta = {"model": "fan", "manifest_sha256": "abc", "metrics": metrics}
    return checkpoints.write(Cursor(epoch, step), weights(epoch), average, optimizer_state(), meta)


@pytest.fixture
def run(tmp_path) -> Checkpoints:
    return Checkpoints(str(tmp_path / "run"))


def path_of(run: Checkpoints, checkpoint: Checkpoint, file: str) -> Path:
    return Path(run.folder.path) / checkpoint.name / file


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Round trip.


@pytest.mark.parametrize("average", [None, weights(0.5)])
def test_what_is_written_comes_back(run, average):
    written = write(run, 2, 7, (0.5, 1.0), average)
    found = Checkpoints(run.folder.uri.removesuffix("/checkpoints")).latest()
    assert found == written
    assert (found.name, found.cursor, found.meta["model"]) == ("epoch-0002-step-000007", Cursor(2, 7), "fan")
    loaded = run.load(found, {"model": "fan", "manifest_sha256": "abc"})
    assert same(loaded, {"model": weights(2), "average": average, "optimizer": optimizer_state()})
    assert all(tensor.device.type == "cpu" for tensor in loaded["model"].values())


def test_meta_names_the_checksum_of_every_file_and_the_versions(run):
    written = write(run, 1, average=weights(0))
    files = {p.name for p in path_of(run, written, "").iterdir()}
    assert files == {"model.safetensors", "average.safetensors", "optimizer.pt", "meta.json"}
    meta = json.loads(path_of(run, written, "meta.json").read_text())
    for name in files - {"meta.json"}:
        assert meta["files"][name] == hashlib.sha256(path_of(run, written, name).read_bytes()).hexdigest()
    assert meta["packages"]["torch"] == importlib.metadata.version("torch")


def test_evaluation_does_not_read_the_optimizer(run):
    written = write(run, 1)
    path_of(run, written, "optimizer.pt").unlink()
    assert same(run.load(written, optimizer=False), {"model": weights(1), "average": None})


def test_a_run_without_checkpoints_has_none(run):
    assert (run.all(), run.latest(), run.best()) == ([], None, None)


def test_writing_a_cursor_again_replaces_it(run):
    write(run, 1)
    again = run.write(Cursor(1, 0), weights(9), None, optimizer_state(), {"model": "fan", "metrics": None})
    assert run.all() == [again]
    assert same(run.load(again)["model"], weights(9))


# Which ones.


def test_latest_goes_by_cursor(run):
    for epoch, step in ((9, 0), (10, 5), (10, 0)):
        write(run, epoch, step)
    assert run.latest().cursor == Cursor(10, 5)


def test_best_goes_by_validation_accuracy_then_loss_then_cursor(run):
    for epoch, score in enumerate([(0.5, 1.0), (0.6, 2.0), (0.6, 1.5), (0.6, 1.5), (0.4, 0.1)], 1):
        write(run, epoch, 0, score)
    write(run, 5, 3)  # inside an epoch: not validated
    assert run.best().cursor == Cursor(4, 0)


def test_best_is_the_latest_where_none_was_validated(run):
    write(run, 0, 3)
    write(run, 0, 6)
    assert run.best().cursor == Cursor(0, 6)


@pytest.mark.parametrize(("num_newest", "kept"), [(1, [2, 5]), (2, [2, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_keep_leaves_the_newest_and_the_best(run, num_newest, kept):
    for epoch, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
        write(run, epoch, 0, (accuracy, 1.0))
    run.keep(num_newest)
    assert [c.cursor.epoch for c in run.all()] == kept
    assert run.folder.names() == [f"epoch-{epoch:04d}-step-000000" for epoch in kept]
    for checkpoint in run.all():
        run.load(checkpoint)


def test_folder_without_meta_is_no_checkpoint_and_goes(run):
    written = write(run, 1)
    cut_off = path_of(run, written, "").with_name("epoch-0002-step-000000")
    cut_off.mkdir()
    (cut_off / "model.safetensors").write_bytes(b"half")
    (cut_off.parent / ".nfs0001").write_text("left behind by a file server")
    assert run.all() == [written]
    assert run.latest() == written
    run.keep(1)
    assert run.folder.names() == [".nfs0001", written.name]


def test_write_that_fails_leaves_the_one_before(run):
    """The optimizer's state cannot be pickled: the weights were written by then."""
    written = write(run, 1)
    with pytest.raises(Exception, match="pickle"):
        run.write(Cursor(2, 0), weights(2), None, {"optimizer": lambda: 0}, {"model": "fan", "metrics": None})
    assert (Path(run.folder.path) / "epoch-0002-step-000000" / "model.safetensors").exists()
    assert run.latest() == written
    run.load(written)


# Damaged and foreign.


def assert_refused(run: Checkpoints, checkpoint: Checkpoint, *words: str, **expect: str) -> None:
    with pytest.raises(UserError) as error:
        run.load(checkpoint, expect)
    text = str(error.value)
    assert run.where(checkpoint.name) in text
    assert "\n" not in text
    for word in words:
        assert word in text


@pytest.mark.parametrize("file", ["model.safetensors", "average.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "one bit", "removed"])
def test_damaged_file_is_refused(run, file, damage):
    written = write(run, 1, average=weights(0))
    path = path_of(run, written, file)
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-1], "emptied": b"", "one bit": content}[damage])
    assert_refused(run, written, file, "lacks" if damage == "removed" else "does not match its checksum")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_damaged_meta_is_refused(run, content):
    written = write(run, 1)
    path_of(run, written, "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json is damaged") as error:
        run.all()
    assert run.where(written.name) in str(error.value)


def test_other_format_version_is_refused(run):
    written = write(run, 1)
    path_of(run, written, "meta.json").write_text(json.dumps({**written.meta, "format_version": 1}))
    with pytest.raises(UserError, match="has format version 1, not 2"):
        run.all()


def test_another_model_or_data_set_is_refused(run):
    written = write(run, 1)
    assert_refused(run, written, "'fan'", "'resnet50v2'", model="resnet50v2")
    assert_refused(run, written, "manifest_sha256", "'abc'", "'def'", model="fan", manifest_sha256="def")
    assert_refused(run, written, "num_classes", num_classes=10)


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def forge(run: Checkpoints, checkpoint: Checkpoint, file: str, content: bytes) -> Checkpoint:
    """Replaces a file and gives it the right checksum, as whoever can write the folder can."""
    path_of(run, checkpoint, file).write_bytes(content)
    checkpoint.meta["files"][file] = hashlib.sha256(content).hexdigest()
    path_of(run, checkpoint, "meta.json").write_text(json.dumps(checkpoint.meta))
    return run.all()[0]


def malicious_files(trace: Path, folder: Path) -> list[bytes]:
    torch.save({"optimizer": Malicious(trace)}, folder / "zipped.pt")
    return [pickle.dumps(Malicious(trace)), (folder / "zipped.pt").read_bytes()]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("forged", [False, True])
def test_malicious_pickle_is_never_executed(run, tmp_path, forged, kind):
    trace = tmp_path / "trace"
    content = malicious_files(trace, tmp_path)[kind]
    written = write(run, 1)
    if forged:
        written = forge(run, written, "optimizer.pt", content)
    else:
        path_of(run, written, "optimizer.pt").write_bytes(content)
    assert_refused(run, written, "optimizer.pt")
    assert not trace.exists()


def test_stray_pickles_beside_a_checkpoint_are_not_read(run, tmp_path):
    written = write(run, 1)
    for name in ("extra.pt", "model.pt", "data.pkl"):
        path_of(run, written, name).write_bytes(malicious_files(tmp_path / "trace", tmp_path)[0])
    assert same(run.load(written)["model"], weights(1))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused_even_with_the_right_checksum(run, content):
    assert_refused(run, forge(run, write(run, 1), "model.safetensors", content), "model.safetensors")


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("where the run should be")
    run = Checkpoints(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot \w+ .*file/checkpoints"):
        write(run, 1)


# Object storage.


@pytest.fixture
def s3_uri(monkeypatch) -> Iterator[str]:
    """A bucket on a server that speaks S3, on loopback."""
    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    fs, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
    fs.create_dir("bucket")
    yield f"s3://bucket/runs/first?{query}"
    server.stop()


def test_round_trip_on_s3(s3_uri):
    run = Checkpoints(s3_uri)
    assert run.latest() is None
    for epoch, accuracy in ((1, 0.9), (2, 0.1), (3, 0.2)):
        write(run, epoch, 0, (accuracy, 1.0), weights(0.5))
    run.keep(1)
    assert [c.cursor.epoch for c in run.all()] == [1, 3]
    loaded = Checkpoints(s3_uri).load(run.best(), {"model": "fan"})
    assert same(loaded, {"model": weights(1), "average": weights(0.5), "optimizer": optimizer_state()})
    with run.folder.fs.open_output_stream(run.folder.at(f"{run.latest().name}/model.safetensors")) as stream:
        stream.write(b"something else")
    assert_refused(run, run.latest(), "model.safetensors")
