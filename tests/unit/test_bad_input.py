"""What users get wrong: each job says it in one sentence, ends with an error and harms nothing that is stored.

Every case runs the real script, in this process so that torch and Ray are imported once, on a fresh copy of a small
data set, a stored run and some sources.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import runpy
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from cifar_dist import models
from cifar_dist.data import sources, staged, store
from cifar_dist.environment import prepare_environment
from cifar_dist.job_settings import Launch
from cifar_dist.launch import plan
from cifar_dist.recipes import recipe_config
from cifar_dist.run.checkpoint import CheckpointState, Cursor
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.sealed_json import seal, to_json

JOBS = Path(__file__).parents[2] / "jobs"
SECRET = "hunter2secret"  # in an argument: it must not be printed
TRACE = "trace"  # in the working folder: what a malicious pickle would make

# Where the stored things lie.
MANIFEST, CONFIG = "data/_manifest.json", "runs/first/config.json"
TRAIN_FILE, TEST_FILE = "data/train-00000.parquet", "data/test-00000.parquet"
SOURCE_TRAIN, SOURCE_TEST = "parquet/train-00000.parquet", "parquet/test-00000.parquet"
CAT = "pictures/train/cat/0.png"
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.pt", "meta.json"  # of a checkpoint
TEXT = b"this is no picture"


# The stored things, all sound.


def encoded(color: int, encoding: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(buffer, encoding)
    return buffer.getvalue()


def write_runs(folder: Path) -> None:
    """runs/first as a job leaves it in its second epoch, runs/empty as one does before its first checkpoint."""
    from cifar_dist.run import network

    config, data = recipe_config("quickstart_fan"), str(folder / "data")
    planned = plan.make_plan(
        config, Launch(data=data, storage=str(folder / "runs"), name="first", recipe="quickstart_fan")
    )
    for name in ("first", "empty"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.json").write_bytes(to_json(seal(planned.card)))
    optimizer: dict[str, Any] = {"optimizers": [{"state": {}, "param_groups": []}], "scaler": {}}
    for global_step, cursor in enumerate([Cursor(0, 1), Cursor(1, 0), Cursor(1, 1)], 1):
        # The driver looks at no weights but for their checksums: a small tensor keeps the copies small.
        state = CheckpointState(
            model={"weight": torch.full((4, 3), float(global_step))}, average=None, ranks={}, optimizer=optimizer
        )
        meta = {
            **network.expected_of(config, planned.data.manifest),
            "global_step": global_step,
            "metrics": None if cursor.step else {"validation_accuracy": 0.5, "validation_loss": 1.0},
            "totals": [0.0, 0.0, 0.0],
            "num_averaged": 0,
            "config": config.to_dict(),
            "weights": None,
            "data_uri": data,
            "class_names": planned.data.manifest.class_names,
            "world_size": 1,
            "num_threads_per_worker": 1,
        }
        Checkpoints(planned.launch.run_uri).write(cursor, 1, state, meta)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, other (another data set), pictures and parquet (sources), runs and notes.txt."""
    folder = tmp_path_factory.mktemp("whole")
    for name, seed in (("data", 0), ("other", 1)):
        store.prepare(sources.shapes(60, 20, seed), str(folder / name))
    for name in ("cat", "dog"):
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        for i in range(3):
            (folder / "pictures" / "train" / name / f"{i}.png").write_bytes(encoded(i))
    (folder / "parquet").mkdir()
    for name in (TRAIN_FILE, TEST_FILE):
        shutil.copy(folder / name, folder / "parquet")
    (folder / "notes.txt").write_text("mine")
    write_runs(folder)
    return folder


# How they are damaged: each function makes one that is given the folder.

Damage = Callable[[Path], object]


def nothing(_: Path) -> None:
    """The stored things are sound, the command is not."""


def all_of(*damages: Damage) -> Damage:
    return lambda stored: [damage(stored) for damage in damages]


def put(name: str, content: bytes | str) -> Damage:
    return lambda stored: (stored / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def removed(name: str) -> Damage:
    return lambda stored: shutil.rmtree(stored / name) if (stored / name).is_dir() else (stored / name).unlink()


def folder_made(name: str) -> Damage:
    return lambda stored: (stored / name).mkdir(parents=True)


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda stored: (stored / name).write_bytes(change((stored / name).read_bytes()))


def cut(name: str) -> Damage:
    """The first half of a file, as a copy that was broken off leaves it."""
    return rewritten(name, lambda content: content[: len(content) // 2])


def flip(name: str) -> Damage:
    """One bit in the middle of a file."""
    return rewritten(name, lambda c: c[: len(c) // 2] + bytes([c[len(c) // 2] ^ 1]) + c[len(c) // 2 + 1 :])


def edited(name: str, change: Callable[[Any], object]) -> Damage:
    """A JSON file whose values `change` changes; those of a run with their right checksum, as another program may have
    written them."""

    def change_bytes(content: bytes) -> bytes:
        values = json.loads(content)
        change(values)
        return to_json(values if name == MANIFEST else seal(values))

    return rewritten(name, change_bytes)


def digit_more(key: str) -> Callable[[str], Damage]:
    """A number in a JSON file, by its key; the checksum stays as it was."""
    found, made = f'"{key}": '.encode(), f'"{key}": 1'.encode()
    return lambda name: rewritten(name, lambda content: content.replace(found, made, 1))


def updated(name: str, **values: Any) -> Damage:
    return edited(name, lambda found: found.update(values))


def resealed(change: Callable[[Any], object]) -> Damage:
    """The manifest changed, with its right checksum, as another program may have written it; a run trained on that."""

    def act(stored: Path) -> None:
        def change_and_seal(values: dict) -> None:
            change(values)
            values.update(seal(values))
            every_meta(manifest_sha256=values["sha256"])(stored)

        edited(MANIFEST, change_and_seal)(stored)

    return act


def resealed_train(change: Callable[[pa.Table], pa.Table] | bytes) -> Damage:
    """The train split's Parquet file changed (or these bytes), with the right checksums."""

    def act(stored: Path) -> None:
        path = stored / TRAIN_FILE
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            pq.write_table(change(pq.read_table(path)), path)
        content = path.read_bytes()
        words = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        with contextlib.suppress(pa.ArrowException, KeyError, ValueError, AttributeError):  # not of images and labels
            words["rows_sha256"] = staged.rows_sha256(staged.staged_batches(pq.read_table(path).to_batches()))
        resealed(lambda values: values["splits"]["train"]["files"][0].update(words))(stored)
        (stored / "data" / "data_card.json").unlink()  # which is of the data set before

    return act


# Of checkpoints.


def checkpoints_of(stored: Path) -> list[str]:
    return sorted(f"runs/first/checkpoints/{p.name}" for p in (stored / "runs" / "first" / "checkpoints").iterdir())


def every(damage: Callable[[str], Damage]) -> Damage:
    """The damage in every checkpoint of runs/first."""
    return lambda stored: [damage(name)(stored) for name in checkpoints_of(stored)]


def newest(damage: Callable[[str], Damage]) -> Damage:
    return lambda stored: damage(checkpoints_of(stored)[-1])(stored)


def file_of(file: str, damage: Callable[[str], Damage]) -> Callable[[str], Damage]:
    return lambda name: damage(f"{name}/{file}")


def every_meta(**values: Any) -> Damage:
    """Other values in the meta.json of every checkpoint."""
    return every(file_of(META, lambda name: updated(name, **values)))


def forged(file: str, content: bytes | str) -> Callable[[str], Damage]:
    """A file of a checkpoint with its right checksum, as whoever can write the folder can make it."""
    content = content if isinstance(content, bytes) else content.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    return lambda name: all_of(
        put(f"{name}/{file}", content), edited(f"{name}/{META}", lambda found: found["files"].update({file: sha256}))
    )


class Malicious:
    """Unpickling it makes the file TRACE in the working folder."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(TRACE),)


def malicious_archive() -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save({"optimizers": [Malicious()]}, buffer)
    return buffer.getvalue()


PICKLE, ARCHIVE = pickle.dumps(Malicious()), malicious_archive()


# Of sources and weights.


def column(name: str, change: Callable[[pa.Table], pa.Array | None]) -> Callable[[pa.Table], pa.Table]:
    """The table with another column; None drops it."""

    def changed(table: pa.Table) -> pa.Table:
        at, values = table.column_names.index(name), change(table)
        return table.remove_column(at) if values is None else table.set_column(at, name, values)

    return changed


def source(change: Callable[[pa.Table], pa.Table]) -> Damage:
    """The Parquet source's train file changed."""
    return lambda stored: pq.write_table(change(pq.read_table(stored / SOURCE_TRAIN)), stored / SOURCE_TRAIN)


def label(row: int, value: int | None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Array:
        values = table["label"].to_pylist()
        return pa.array([*values[:row], value, *values[row + 1 :]], pa.int64())

    return column("label", change)


def image(content: bytes | None) -> Callable[[pa.Table], pa.Table]:
    """These bytes for every image."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return column("image", lambda table: pa.array([{"bytes": content, "path": "/etc/passwd"}] * len(table), kind))


def no_column(name: str) -> Callable[[pa.Table], pa.Table]:
    return column(name, lambda _: None)


def text_column(name: str) -> Callable[[pa.Table], pa.Table]:
    return column(name, lambda table: pa.array(["cat"] * len(table)))


def metadata(text: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({"huggingface": text})


def weights_file(**layers: dict[str, tuple[int, ...]]) -> Damage:
    """w.h5, an HDF5 file with these layers: variable -> shape."""

    def act(stored: Path) -> None:
        with h5py.File(stored / "w.h5", "w") as file:
            for layer, variables in layers.items():
                for variable, shape in variables.items():
                    file.create_dataset(f"{layer}/{layer}/{variable}:0", data=np.zeros(shape, np.float32))

    return act


def fan_weights(stored: Path) -> None:
    """Checkpoints whose weights fit the network, in place of the small ones."""
    every(forged(MODEL, safetensors.torch.save(models.build("fan", 10).state_dict())))(stored)


BATCHNORM = dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (3,))


# The table.


@dataclass(frozen=True)
class Case:
    """`job` with `args`, in which {s} is the folder of the stored things, after `damage`.

    words: in the message. new: places in that folder in which the job may make files. live: it needs Ray.
    """

    id: str
    job: str
    args: str
    words: tuple[str, ...]
    damage: Damage = nothing
    code: int = 1
    new: tuple[str, ...] = ()
    live: bool = False

    def param(self) -> Any:
        marks = [pytest.mark.cluster] * self.live
        return pytest.param(self, id=f"{self.job}: {self.id}", marks=marks)


def job(name: str, base: str) -> Callable[..., Case]:
    """Cases of one job; an option given again overrides the one in `base`."""
    return lambda id, args, *words, **rest: Case(id, name, f"{base} {args}", words, **rest)


STORED = "--recipe quickstart_fan --data {s}/data --storage {s}/runs"
train = job("train", f"{STORED} --name new --staging-folder staged")
resume = job("train", f"{STORED} --name first --explain-resume")  # the stored run continued, but for the running
finished = job("train", f"{STORED} --name first --epochs 1")  # the stored run seems finished
evaluate = job("evaluate", "--runs {s}/runs/first --data {s}/data --out out --staging-folder staged --shards 1")
shapes = job("prepare", "--source shapes --num-train 20 --num-test 20 --out out")
pictures = job("prepare", "--source folder --path {s}/pictures --out out")
parquet = job("prepare", "--source parquet --path {s}/parquet --out out")
prepare = job("prepare", "")
pipeline = job("pipeline", "--num-train 20 --num-test 20 --out out")
weights = job("weights", "--out out")

RESNET = "--recipe quickstart_resnet50v2"
NO_CLUSTER = "--address nowhere"  # whatever should be found before Ray is needed is found before this is
EVIL = f"s3://AKIAEXAMPLE:{SECRET}@bucket/runs"
CREDENTIALS = ("credentials", "AWS_SECRET_ACCESS_KEY")
NO_ENDPOINT = "'s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1'"
EMPTY = ("empty path or URI", "s3://bucket/folder")

# fmt: off

OPTIONS = [
    train("an option misspelt", "--epoch 3", "unknown option --epoch", "did you mean --epochs?", code=2),
    train("an option abbreviated", "--learning 0.1", "unknown option --learning", "--help", code=2),
    train("a word without an option", "twice", "unknown option twice", code=2),
    train("an option without its value", "--epochs", "--epochs", "expected one argument", code=2),
    train("a value misspelt", "--optimizer adamm", "--optimizer", "'adamm'", "did you mean adam", code=2),
    train("a device that is none", "--device cuda", "--device", "'cuda'", "auto, cpu, gpu", code=2),
    train("text for a number", "--epochs many", "--epochs", "int", "'many'", code=2),
    train("a fraction of an epoch", "--epochs 1.5", "--epochs", "int", "'1.5'", code=2),
    train("text for yes or no", "--finetune maybe", "--finetune", "'maybe'", "neither true nor false", code=2),
    train("an unknown recipe", "--recipe deck_fann", "unknown recipe 'deck_fann'", "did you mean deck_fan?"),
    train("an empty recipe", "--recipe ''", "unknown recipe ''", "deck_fan"),
    train("a rate that is no number", "--learning-rate nan", "--learning-rate", "finite", "nan"),
    train("an infinite rate", "--learning-rate inf", "--learning-rate", "finite", "inf"),
    train("a negative rate", "--learning-rate -0.1", "--learning-rate", "0 or more", "-0.1"),
    train("no epochs", "--epochs 0", "--epochs", "1 or more", "not 0"),
    train("a negative batch", "--global-batch-size -4", "--global-batch-size", "1 or more", "-4"),
    train("a negative seed", "--seed -1", "--seed", "from 0 to", "not -1"),
    train("a seed too large", "--seed 4294967296", "--seed", "from 0 to 2147483647", "not 4294967296"),
    train("a momentum above one", "--momentum 1.5", "--momentum", "from 0 to 0.9999", "not 1.5"),
    train("no validation", "--validation-fraction 0", "--validation-fraction", "from 0.0001 to 0.9"),
    train("all for validation", "--validation-fraction 1", "--validation-fraction", "from 0.0001 to 0.9"),
    train("keeping no checkpoints", "--keep-checkpoints 0", "--keep-checkpoints", "1 or more"),
    train("fan at 224 px", "--image-size 224", "fan", "--image-size must be 32, not 224"),
    train("resnet50v2 at 32 px", f"{RESNET} --image-size 32", "resnet50v2", "--image-size of 96 or more, not 32"),
    train("fine-tuning fan", "--finetune", "--finetune is for resnet50v2"),
    train("cutting the whole image out", "--cutout-size 32", "--cutout-size", "less than --image-size 32"),
    train("cropping beyond the image", "--crop-padding 40", "--crop-padding", "less than --image-size 32"),
    train("zero workers", "--workers 0", "--workers must be 1 or more", "not 0"),
    train("minus one worker", "--workers -1", "--workers must be 1 or more", "-1"),
    train("workers that are no number", "--workers x", "--workers", "'x'", "1:4", code=2),
    train("a range of workers cut off", "--workers 2:", "--workers", "'2:'", "1:4", code=2),
    train("a range of workers backwards", "--workers 3:1", "--workers", "3:1", "1:4"),
    train("a range of workers from zero", "--workers 0:2", "--workers", "0:2", "1:4"),
    train("a batch smaller than the workers", "--workers 5 --global-batch-size 4",
          "--global-batch-size 4", "5 workers"),
    train("failures below zero", "--max-failures -1", "--max-failures must be 0 or more, not -1"),
    train("no time for a collective", "--collective-timeout-seconds 0", "--collective-timeout-seconds", "1 or more"),
    train("resizing at no time", "--resize-seconds nan", "--resize-seconds", "1 or more, not nan"),
    train("a name with a folder in it", "--name team/first", "'team/first'", "--storage"),
    train("a name that leads outside", "--name ../first", "'../first'", "no run name"),
    train("a name that is the folder above", "--name ..", "'..'", "no run name"),
    train("an empty name", "--name ''", "--name ''", "no run name"),
    train("a name too long", f"--name {'n' * 101}", "no run name", "up to 100"),
    train("a name with a leading dash", "--name -first", "--name", "expected one argument", code=2),
    train("a name with a leading dash after =", "--name=-first", "'-first'", "beginning with a letter or digit"),
    train("a name with a space", "--name 'my run'", "'my run'", "no run name"),
]

PLACES = [
    train("empty storage", "--storage ''", *EMPTY),
    train("storage of an unknown kind", "--storage foo://runs", "cannot open the URI foo://runs"),
    train("storage on the web", "--storage https://example.com/runs", "cannot open the URI https://example.com/runs"),
    train("storage of a kind that is not installed", "--storage hdfs://nowhere/runs", "cannot open the URI hdfs:"),
    resume("storage without a bucket", "--storage s3://", "s3://", "bucket"),
    resume("storage with a slash missing", "--storage s3:/bucket/runs", "s3:/bucket/runs", "s3://bucket"),
    shapes("an out with a slash missing", "--out s3:/bucket/data", "s3:/bucket/data", "s3://bucket"),
    resume("storage at a server that does not answer", f"--storage {NO_ENDPOINT}", "s3://bucket/runs", "127.0.0.1:1"),
    train("storage that is a file", "--storage {s}/notes.txt", "{s}/notes.txt/new"),
    train("a run that is a file", "--storage {s} --name notes.txt", "{s}/notes.txt"),
    train("credentials in the storage URI", f"--storage {EVIL}", *CREDENTIALS),
    train("a secret with a slash in the URI", f"--storage s3://AKIAEXAMPLE:a/{SECRET}@bucket/runs", *CREDENTIALS),
    train("a secret in the URI's query", f"--storage s3://bucket/runs?secret_key={SECRET}", "holds credentials"),
    train("credentials in the data URI", f"--data {EVIL}", *CREDENTIALS),
    train("credentials in the weights URI", f"--weights {EVIL}", *CREDENTIALS),
    train("empty data", "--data ''", *EMPTY),
    train("data that are not there", "--data {s}/nowhere", "{s}/nowhere is no data set", "jobs/prepare.py"),
    train("data that are a file", "--data {s}/notes.txt", "{s}/notes.txt is no data set", "jobs/prepare.py"),
    train("data that are a source", "--data {s}/pictures", "{s}/pictures is no data set", "jobs/prepare.py"),
    train("data without a manifest", "", "no _manifest.json", "jobs/prepare.py", damage=removed(MANIFEST)),
    train("data of an unknown kind", "--data foo://data", "cannot open the URI foo://data"),
]

AT_MANIFEST = ("{s}/" + MANIFEST, "damaged", "prepare the data set again")
MANIFESTS = [
    train("an empty manifest", "", *AT_MANIFEST, damage=put(MANIFEST, "")),
    train("a manifest cut off", "", *AT_MANIFEST, damage=cut(MANIFEST)),
    train("a manifest that is no JSON", "", *AT_MANIFEST, damage=put(MANIFEST, "classes: 10")),
    train("a manifest that is a list", "", *AT_MANIFEST, damage=put(MANIFEST, "[1]")),
    train("a manifest that is null", "", *AT_MANIFEST, damage=put(MANIFEST, "null")),
    train("a manifest of zeros", "", *AT_MANIFEST, damage=put(MANIFEST, bytes(500))),
    train("a manifest that is no text", "", *AT_MANIFEST, damage=put(MANIFEST, b"\xff\x80")),
    train("a manifest that lacks a key", "", *AT_MANIFEST, damage=edited(MANIFEST, lambda found: found.pop("splits"))),
    train("a manifest with a key too many", "", *AT_MANIFEST, damage=updated(MANIFEST, colour="red")),
    train("a manifest of another version", "", "{s}/" + MANIFEST, "format version 7", "reads 2", "prepare it again",
          damage=updated(MANIFEST, format_version=7)),
    train("a manifest that was edited", "", "{s}/" + MANIFEST, "its own checksum", "prepare the data set again",
          damage=edited(MANIFEST, lambda values: values["class_names"].reverse())),
    train("a manifest without a train split", "", "{s}/" + MANIFEST, "train",
          damage=resealed(lambda values: values["splits"].pop("train"))),
    train("more train images than there are", "--train-images 99", "--train-images is 99", "60 train images"),
    train("no class with two images", "", "validation", "2 train images",
          damage=resealed(lambda values: values["splits"]["train"].update(num_rows_per_class=[1] * 10))),
    train("decoded images of several sizes", "--cache decoded", "--cache decoded", "one size", "--cache auto",
          damage=resealed(lambda values: values["splits"]["train"].update(height=[20, 32]))),
]

AT_CONFIG = ("{s}/" + CONFIG, "damaged", "use another --name")
RUNS = [
    resume("another data set", "--data {s}/other", "first", "another data set", "use another --name"),
    resume("another data set in its place", "", "first", "another data set", "use another --name",
           damage=all_of(removed("data"), lambda stored: shutil.copytree(stored / "other", stored / "data"))),
    resume("another batch size", "--global-batch-size 8", "global_batch_size=32, not 8", "another --name"),
    resume("another recipe", "--recipe deck_fan", "first was started with", "another --name"),
    resume("another network", RESNET, "first was started with", "another --name"),
    resume("a config cut off", "", *AT_CONFIG, damage=cut(CONFIG)),
    resume("an empty config", "", *AT_CONFIG, damage=put(CONFIG, "")),
    resume("a config that is a list", "", *AT_CONFIG, damage=put(CONFIG, "[]")),
    resume("a config that is no text", "", *AT_CONFIG, damage=put(CONFIG, b"\xff\xfe\x00")),
    resume("a config that lacks a key", "", *AT_CONFIG, damage=edited(CONFIG, lambda v: v.pop("manifest_sha256"))),
    resume("a config with a section that is text", "", *AT_CONFIG,
           damage=edited(CONFIG, lambda values: values["config"].update(loop="fast"))),
    resume("a config with weights that are text", "", *AT_CONFIG, damage=updated(CONFIG, weights="imagenet")),
    resume("a digit more in a config", "", *AT_CONFIG, "its own checksum", "remove that file",
           damage=digit_more("epochs")(CONFIG)),
    resume("a lost config and another batch size", "--global-batch-size 8", "global_batch_size=32, not 8",
           "another --name", damage=removed(CONFIG)),
    resume("a run that was started from weights", "", "/w.h5", "--weights", "another --name",
           damage=updated(CONFIG, weights={"uri": "/w.h5", "sha256": "ab", "is_imagenet": False})),
]

AT_META = ("{s}/runs/first/checkpoints/epoch-", META, "damaged", "remove that folder")
AT_ONE = ("{s}/runs/first/checkpoints/epoch-", "damaged", "remove that folder")
AT_ALL = ("no checkpoint", "{s}/runs/first/checkpoints/epoch-", "remove that folder", "another --name")
NOT_OURS = (*AT_ALL, "not written by this program")
NO_FILES = (*AT_META, "files is not as this program writes it")
CHECKPOINTS = [
    resume("every meta.json cut off", "", *AT_META, damage=every(file_of(META, cut))),
    resume("every meta.json empty", "", *AT_META, damage=every(file_of(META, lambda name: put(name, "")))),
    resume("every meta.json a list", "", *AT_META, damage=every(file_of(META, lambda name: put(name, "[]")))),
    resume("every meta.json null", "", *AT_META, damage=every(file_of(META, lambda name: put(name, "null")))),
    resume("every meta.json without the optimizer's file", "", *AT_ONE,
           damage=every(file_of(META, lambda name: edited(name, lambda found: found["files"].pop(OPTIMIZER))))),
    resume("a digit more in every meta.json", "", "{s}/runs/first/checkpoints/epoch-", META, "its own checksum",
           "remove that folder", damage=every(file_of(META, digit_more("global_step")))),
    resume("every meta.json with metrics in words", "", *AT_META, damage=every_meta(metrics="good")),
    resume("every meta.json without files", "", *AT_ONE, damage=every_meta(files=None)),
    resume("every meta.json with a list of files", "", *AT_ONE, damage=every_meta(files=[MODEL])),
    resume("every meta.json with an epoch in words", "", *AT_META, damage=every_meta(epoch="two")),
    resume("every meta.json without the number of workers", "", *AT_META,
           damage=every(file_of(META, lambda name: edited(name, lambda found: found.pop("world_size"))))),
    resume("checkpoints of another format", "", "format version 99", "--name", damage=every_meta(format_version=99)),
    resume("checkpoints of another model", "", "model 'resnet50v2'", "'fan'", "use another --name",
           damage=every_meta(model="resnet50v2")),
    resume("checkpoints of another version of the network", "", "version 7 of the network fan",
           "this program computes version 1", "another --name", damage=every_meta(model_version=7)),
    resume("checkpoints of another class count", "", "num_classes 7", "10", "use another --name",
           damage=every_meta(num_classes=7)),
    resume("checkpoints of another data set", "", "manifest_sha256", "use another --name",
           damage=every_meta(manifest_sha256="ab" * 32)),
    resume("all weights cut off", "", *AT_ALL, MODEL, "checksum", damage=every(file_of(MODEL, cut))),
    resume("a bit changed in all weights", "", *AT_ALL, MODEL, "checksum", damage=every(file_of(MODEL, flip))),
    resume("no weights in any checkpoint", "", *AT_ALL, "lacks", MODEL, damage=every(file_of(MODEL, removed))),
    resume("no optimizer state in any checkpoint", "", *AT_ALL, "lacks", damage=every(file_of(OPTIMIZER, removed))),
    resume("a bit changed in all optimizer states", "", *AT_ALL, damage=every(file_of(OPTIMIZER, flip))),
    resume("safetensors cut off, with their checksum", "", *NOT_OURS, MODEL,
           damage=every(forged(MODEL, b'\x40\0\0\0\0\0\0\0{"weight":'))),
    resume("safetensors that are none", "", *NOT_OURS, MODEL, damage=every(forged(MODEL, b"\xff" * 64))),
    resume("a malicious pickle", "", *AT_ALL, OPTIMIZER, "checksum",
           damage=every(file_of(OPTIMIZER, lambda name: put(name, PICKLE)))),
    resume("a malicious pickle with its checksum", "", *NOT_OURS, OPTIMIZER, damage=every(forged(OPTIMIZER, PICKLE))),
    resume("a malicious archive with its checksum", "", *NOT_OURS, OPTIMIZER,
           damage=every(forged(OPTIMIZER, ARCHIVE))),
    resume("a malicious pickle for weights", "", *NOT_OURS, MODEL, damage=every(forged(MODEL, PICKLE))),
    resume("a malicious archive for the average", "", *NO_FILES, damage=every(forged("average.pt", ARCHIVE))),
    resume("a malicious archive of another name", "", *NO_FILES, damage=every(forged("extra.pkl", ARCHIVE))),
    finished("a finished run that cannot be read", "", *AT_ALL, MODEL, damage=every(file_of(MODEL, cut))),
    finished("a finished run of another model", "", "model 'resnet50v2'", "'fan'", "use another --name",
             damage=every_meta(model="resnet50v2")),
]

H5 = "--weights {s}/w.h5"
WEIGHTS = [
    train("weights that are not there", "--weights {s}/no.h5", "no file {s}/no.h5", "jobs/weights.py"),
    train("weights that are text", "--weights {s}/notes.txt", "{s}/notes.txt is not a Keras weights file"),
    train("weights that are a folder", "--weights {s}/pictures", "{s}/pictures"),
    train("weights of an unknown kind", "--weights foo://w.h5", "cannot open the URI foo://w.h5"),
    train("weights that torch saved", "--weights {s}/w.pt", "{s}/w.pt is not a Keras weights file",
          damage=put("w.pt", ARCHIVE)),
    train("weights cut off", H5, "{s}/w.h5 is not a Keras weights file",
          damage=all_of(weights_file(conv2d={"kernel": (3, 3, 3, 64)}), cut("w.h5"))),
    train("weights without layers", H5, "{s}/w.h5 holds no layers", damage=weights_file()),
    train("weights of too few layers", H5, "{s}/w.h5 lacks the layer", damage=weights_file(batchnorm=BATCHNORM)),
    train("weights of another shape", H5, "{s}/w.h5: kernel of layer conv2d", "[5, 5, 3, 7]",
          damage=weights_file(conv2d={"kernel": (5, 5, 3, 7), "bias": (7,)})),
    train("weights of another network", f"{RESNET} {H5}", "{s}/w.h5 lacks the layer",
          damage=weights_file(conv1_conv={"kernel": (7, 7, 3, 64), "bias": (64,)})),
    weights("a path that is not there", "--path {s}/no.h5", "--path {s}/no.h5 is not a file"),
    weights("a folder for a path", "--path {s}/pictures", "--path {s}/pictures is not a file"),
    weights("another file", "--path {s}/notes.txt", "{s}/notes.txt is not the expected file", "md5"),
    weights("text with the right checksum", f"--path {{s}}/notes.txt --md5 {hashlib.md5(b'mine').hexdigest()}",
            "{s}/notes.txt is not a Keras weights file"),
    weights("an empty out", "--out '' --path {s}/notes.txt", *EMPTY),
    weights("an option without its value", "--path", "--path", "expected one argument", code=2),
    weights("a mirror with a password that does not answer", f"--url http://me:{SECRET}@127.0.0.1:1/w.h5",
            "cannot download", "127.0.0.1:1/w.h5", "--path"),
]

BAD_CAT = ("{s}/" + CAT, "--skip-bad")
PREPARE = [
    shapes("an option misspelt", "--skipbad", "unknown option --skipbad", "--skip-bad", code=2),
    shapes("an unknown source", "--source shape", "'shape'", "did you mean shapes", code=2),
    shapes("text for a number", "--num-train many", "--num-train", "'many'", code=2),
    shapes("too few shapes", "--num-train 19", "--num-train", "20 or more"),
    shapes("a negative number of shapes", "--num-test -5", "--num-test", "20 or more"),
    shapes("shapes from a folder", "--path {s}/pictures", "shapes", "no --path"),
    shapes("nothing for test", "--test-fraction 0", "--test-fraction", "between 0 and 1, not 0"),
    shapes("everything for test", "--test-fraction 1", "--test-fraction", "between 0 and 1, not 1"),
    shapes("a test share that is no number", "--test-fraction nan", "--test-fraction", "between 0 and 1, not nan"),
    shapes("a negative seed", "--data-seed -1", "--data-seed must be 0 or more, not -1"),
    shapes("an empty out", "--out ''", *EMPTY),
    shapes("an out of an unknown kind", "--out foo://data", "cannot open the URI foo://data"),
    shapes("credentials in out", f"--out {EVIL}", *CREDENTIALS),
    shapes("an out that is a file", "--out {s}/notes.txt", "{s}/notes.txt"),
    shapes("an out below a file", "--out {s}/notes.txt/data", "{s}/notes.txt"),
    shapes("another data set in out", "--out {s}/data --data-seed 5", "{s}/data already holds another", "--overwrite",
           new=("data/.cifar_dist-preparing",)),
    shapes("a damaged manifest in out", "--out {s}/data", "{s}/" + MANIFEST, "damaged", "--overwrite",
           damage=cut(MANIFEST)),
    shapes("a manifest of another version in out", "--out {s}/data", "{s}/" + MANIFEST, "version 3", "--overwrite",
           damage=updated(MANIFEST, format_version=3)),
    pictures("no folder given", "--path ''", "needs --path: a folder, an archive or a URI"),
    pictures("no such folder", "--path {s}/nowhere", "{s}/nowhere does not exist", "a folder, an archive or a URI"),
    pictures("a file for the folder", "--path {s}/notes.txt", "{s}/notes.txt"),
    pictures("a folder without pictures", "--path {s}/flat", "{s}/flat holds no pictures", "CLASS/IMAGE",
             damage=folder_made("flat/train")),
    pictures("a single class", "", "holds 1 classes, 'cat'", "2 or more", damage=removed("pictures/train/dog")),
    pictures("an empty class", "", "'emu' has no images in {s}/pictures/train", "remove the folder",
             damage=folder_made("pictures/train/emu")),
    pictures("a class in test only", "", "'emu' is in {s}/pictures/test but not in {s}/pictures/train",
             damage=all_of(*(all_of(folder_made(f"pictures/test/{name}"),
                                    put(f"pictures/test/{name}/0.png", encoded(1))) for name in ("cat", "emu")))),
    pictures("an image that is text", "", *BAD_CAT, damage=put(CAT, TEXT)),
    pictures("an image cut off", "", *BAD_CAT, damage=cut(CAT)),
    pictures("an image with a changed bit", "", *BAD_CAT, damage=flip(CAT)),
    pictures("an image of no bytes", "", *BAD_CAT, "is empty", damage=put(CAT, b"")),
    pictures("an image of another format", "", *BAD_CAT, "a Photoshop file (PSD)", "convert it to JPEG or PNG",
             damage=put(CAT, b"8BPS\0\1" + bytes(99))),
    pictures("an image of no class", "", "{s}/pictures/train/0.png lies in no class folder", "would not be read",
             "--labels", damage=put("pictures/train/0.png", encoded(1))),
    pictures("a class of bad images only", "--skip-bad", "'cat' would lose", "--max-bad-share allows",
             damage=all_of(*(put(f"pictures/train/cat/{i}.png", TEXT) for i in range(3)))),
    pictures("a class of bad images only, all allowed", "--skip-bad --max-bad-share 1",
             "'cat' has no usable images in the train split",
             damage=all_of(*(put(f"pictures/train/cat/{i}.png", TEXT) for i in range(3)))),
    pictures("labels that are not there", "--labels no.csv", "no file no.csv", "below --path"),
    pictures("a table of labels that names no picture", "--labels {s}/labels.csv", "{s}/labels.csv line 2",
             "train/cow/0.png", damage=put("labels.csv", "path,label\ntrain/cow/0.png,cow\n")),
    pictures("a column for folders", "--label-column class", "--label-column", "are for tables"),
    pictures("an out in the source", "--out {s}/pictures/train/data", "--out", "lie in each other"),
    pictures("an out that is the source", "--out {s}/pictures", "--out", "lie in each other"),
    parquet("no Parquet folder given", "--path ''", "needs --path"),
    parquet("no such Parquet folder", "--path {s}/nowhere", "{s}/nowhere does not exist"),
    parquet("a folder without Parquet", "--path {s}/pictures", "{s}/pictures holds no Parquet or Arrow files",
            "--source folder"),
    parquet("another file for the folder", "--path {s}/runs/first/config.json", "holds no Parquet or Arrow files"),
    parquet("credentials in the path", f"--path {EVIL}", *CREDENTIALS),
    parquet("Parquet that is text", "", "{s}/" + SOURCE_TRAIN + " is not a readable Parquet file",
            damage=put(SOURCE_TRAIN, "label,image")),
    parquet("Parquet cut off", "", "{s}/" + SOURCE_TRAIN + " is not a readable Parquet file", damage=cut(SOURCE_TRAIN)),
    parquet("Parquet of no bytes", "", "{s}/" + SOURCE_TEST + " is not a readable Parquet file",
            damage=put(SOURCE_TEST, "")),
    parquet("no labels", "", "{s}/" + SOURCE_TRAIN, "the columns image (struct)", "which holds the labels",
            "--label-column", damage=source(no_column("label"))),
    parquet("no images", "", "{s}/" + SOURCE_TRAIN, "the columns label (int64)", "which holds the pictures",
            "--image-column", damage=source(no_column("image"))),
    parquet("images that are text", "", "image (string)", "which holds the pictures",
            damage=source(text_column("image"))),
    parquet("labels of other classes", "", "has pictures of class 'circle', and train has none",
            damage=source(text_column("label"))),
    parquet("a label column that is not there", "--label-column lable", "{s}/" + SOURCE_TRAIN + " has no column lable",
            "did you mean label?"),
    parquet("a label out of range", "", "row 3 has the label 10", "0 to 9 are valid", damage=source(label(3, 10))),
    parquet("a negative label", "", "row 0 has the label -1", "names no class", damage=source(label(0, -1))),
    parquet("a missing label", "", "row 5 has the label None", "names no class", damage=source(label(5, None))),
    parquet("metadata cut off", "", "{s}/" + SOURCE_TRAIN + " has Hugging Face metadata that cannot be read",
            damage=source(metadata('{"info": '))),
    parquet("metadata that are a list", "", "{s}/" + SOURCE_TRAIN + " has Hugging Face metadata that cannot be read",
            damage=source(metadata("[]"))),
    parquet("rows whose image is text", "", SOURCE_TRAIN + " row 0", "--skip-bad", damage=source(image(TEXT))),
    parquet("rows without an image", "", SOURCE_TRAIN + " row 0 names the file /etc/passwd", "--skip-bad",
            damage=source(image(None))),
    prepare("CIFAR-10 in no folder", "--source cifar10 --path {s}/nowhere --out out", "{s}/nowhere", "--path"),
    prepare("CIFAR-10 in a file", "--source cifar10 --path {s}/notes.txt --out out", "{s}/notes.txt", "--path"),
    prepare("no source", "--out out", "required", "--source", code=2),
    prepare("no out", "--source shapes", "required", "--out", code=2),
]

PIPELINE = [
    pipeline("a recipe twice", "--recipes deck_fan deck_fan", "--recipes names one twice"),
    pipeline("an unknown recipe", "--recipes quickstart_fan best_fann", "unknown recipe 'best_fann'", "best_fan?"),
    pipeline("a setting that one recipe refuses", "--image-size 32", "resnet50v2", "--image-size of 96"),
    pipeline("no worker", "--workers 0", "--workers must be 1 or more"),
    pipeline("a batch smaller than the workers", "--workers 5 --global-batch-size 4", "--global-batch-size 4"),
    pipeline("an empty out", "--out ''", *EMPTY),
    pipeline("credentials in out", f"--out {EVIL}", *CREDENTIALS),
    pipeline("an out that is a file", "--out {s}/notes.txt", "{s}/notes.txt"),
    pipeline("a source that is not there", "--source folder --path {s}/nowhere", "{s}/nowhere does not exist"),
    pipeline("an option misspelt", "--recipe best_fan", "unknown option --recipe", "--recipes", code=2),
    pipeline("a negative number of shards", f"--shards -1 {NO_CLUSTER}", "--shards must be 1 or more, not -1"),
    pipeline("weights of the second recipe that are not there", f"--weights {{s}}/no.h5 {NO_CLUSTER}", "{s}/no.h5"),
]

EVALUATE = [
    evaluate("a negative number of shards", "--shards -1", "--shards must be 1 or more, not -1"),
    evaluate("shards that are no number", "--shards x", "--shards", "'x'", code=2),
    evaluate("an unknown split", "--splits valid", "--splits", "'valid'", "did you mean validation", code=2),
    evaluate("an option without its runs", "--runs", "--runs", "expected at least one argument", code=2),
    evaluate("a cluster by a name that is none", NO_CLUSTER, "'nowhere' is no address of a Ray cluster", "HOST:PORT"),
    train("a cluster by a name that is none", NO_CLUSTER, "'nowhere' is no address of a Ray cluster", "HOST:PORT"),
    train("a cluster that does not answer", "--address 127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
    evaluate("runs that are not there, before Ray starts", "--runs {s}/runs/no " + NO_CLUSTER, "{s}/runs/no"),
    evaluate("data that are not there, before Ray starts", "--data {s}/no " + NO_CLUSTER, "{s}/no is no data set"),
]

AT_TRAIN_FILE = ("{s}/" + TRAIN_FILE, "prepare")
DAMAGED_STATE = ("{s}/runs/first/checkpoints/epoch-", MODEL, "remove that folder")
ATTEMPT = ("runs/first/attempts", "runs/first/ray")
LIVE = [  # on a Ray cluster of 2 CPUs
    evaluate("a run that is not there", "--runs {s}/runs/no", "{s}/runs/no has no checkpoint", "train it first"),
    evaluate("a run without checkpoints", "--runs {s}/runs/empty", "{s}/runs/empty has no checkpoint"),
    evaluate("an empty run", "--runs ''", *EMPTY),
    evaluate("a run that is a file", "--runs {s}/notes.txt", "{s}/notes.txt"),
    evaluate("one run twice", "--runs {s}/runs/first {s}/runs/first/", "must differ in name", "first, first"),
    evaluate("credentials in a run", f"--runs {EVIL}", *CREDENTIALS),
    evaluate("another data set", "--data {s}/other", "{s}/runs/first was trained on another data set"),
    evaluate("no data set", "--data {s}/pictures", "{s}/pictures is no data set", "jobs/prepare.py"),
    evaluate("a manifest cut off", "", *AT_MANIFEST, damage=cut(MANIFEST)),
    evaluate("more GPUs than exist", "--device gpu", "GPU", "the cluster has 0", "--device cpu"),
    evaluate("every meta.json cut off", "", *AT_META, damage=every(file_of(META, cut))),
    evaluate("every meta.json without its data set", "", *AT_META,
             damage=every(file_of(META, lambda name: edited(name, lambda found: found.pop("manifest_sha256"))))),
    evaluate("no place to stage", "--staging-folder {s}/notes.txt", "cannot make the folder", "--staging-folder"),
    evaluate("Parquet missing", "", *AT_TRAIN_FILE, "missing", damage=removed(TRAIN_FILE)),
    evaluate("Parquet cut off", "", *AT_TRAIN_FILE, "checksum", damage=cut(TRAIN_FILE)),
    evaluate("Parquet with a changed bit", "", *AT_TRAIN_FILE, "checksum", damage=flip(TRAIN_FILE)),
    evaluate("Parquet of another data set", "", *AT_TRAIN_FILE, "checksum",
             damage=lambda stored: shutil.copy(stored / "other" / "train-00000.parquet", stored / "data")),
    evaluate("Parquet with fewer rows", "", "{s}/data", "59 train rows", "says 60",
             damage=resealed_train(lambda table: table.slice(1))),
    evaluate("labels out of range", "", *AT_TRAIN_FILE, "labels outside 0 to 9", damage=resealed_train(label(3, 10))),
    evaluate("Parquet that is none, with its checksum", "", *AT_TRAIN_FILE, damage=resealed_train(b"PAR1 text PAR1")),
    evaluate("Parquet without labels", "", *AT_TRAIN_FILE, damage=resealed_train(no_column("label"))),
    evaluate("Parquet whose images are text", "", *AT_TRAIN_FILE, damage=resealed_train(text_column("image"))),
    evaluate("Parquet with a missing label", "", *AT_TRAIN_FILE, damage=resealed_train(label(3, None))),
    evaluate("images that cannot be decoded", "", "image /etc/passwd (row 0 of t", "prepare the data set again",
             damage=all_of(fan_weights, resealed_train(image(TEXT)))),
    evaluate("an out that is a file", "--out {s}/notes.txt", "{s}/notes.txt"),
    evaluate("all weights cut off", "", *DAMAGED_STATE, "checksum", damage=every(file_of(MODEL, cut))),
    evaluate("a malicious pickle for weights", "", *DAMAGED_STATE, damage=every(forged(MODEL, PICKLE))),
    evaluate("weights of other layers", "", "{s}/runs/first/checkpoints/epoch-"),
    evaluate("another version of the network", NO_CLUSTER, "{s}/runs/first/checkpoints/epoch-",
             "version 7 of the network fan", damage=every_meta(model_version=7)),
    evaluate("an unknown setting in every checkpoint", "", "unknown setting 'speed'", "{s}/runs/first",
             damage=every_meta(config={"loop": {"speed": 3}})),
    train("more GPUs than exist", "--device gpu --workers 2", "2 workers need a GPU each", "the cluster has 0",
          "--device cpu"),
    train("more workers than cores", "--workers 3", "3 workers need a CPU each", "the cluster has 2",
          "lower --workers"),
    train("no place to stage", "--staging-folder {s}/notes.txt/x", "preflight failed", "--staging-folder",
          new=("runs/new",)),
    train("Parquet with a changed bit", "", *AT_TRAIN_FILE, "checksum", damage=flip(TRAIN_FILE), new=("runs/new",)),
    train("checkpoints of other layers", "--name first", "{s}/runs/first/checkpoints/epoch-", "does not fit",
          "another --name", new=ATTEMPT),
]

# fmt: on

CASES = [*OPTIONS, *PLACES, *MANIFESTS, *RUNS, *CHECKPOINTS, *WEIGHTS, *PREPARE, *PIPELINE, *EVALUATE]
CASES += [dataclasses.replace(case, live=True) for case in LIVE]


# Running them.


@pytest.fixture(scope="module", autouse=True)
def jobs_environment() -> Iterator[None]:
    """jobs/ can be imported, as it can beside a script that runs; the environment is put back."""
    before, path = dict(os.environ), list(sys.path)
    sys.path.insert(0, str(JOBS))
    prepare_environment()  # Ray reads it when it is imported
    # Else pyarrow looks for credentials on the network.
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    # Else Ray tells of tasks that nobody waits for seconds later: during another case, when a real job has ended.
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    yield
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with 2 CPUs; a job finds this process connected to it."""
    import ray

    from cifar_dist.launch.cluster import connect

    assert not ray.is_initialized()
    with contextlib.chdir(os.sep):  # Ray's workers start where Ray was started: that folder must stay
        connect(None, 2)
    yield
    ray.shutdown()


@pytest.fixture
def stored(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh copy of the stored things; the working folder is another one, and empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    copy = Path(shutil.copytree(whole, tmp_path / "stored"))
    for path in (copy / "runs").rglob("*.json"):  # they name the data set
        path.write_bytes(to_json(seal(json.loads(path.read_text().replace(str(whole), str(copy))))))
    yield copy
    for name in ("stored", "work"):  # there are hundreds of them
        shutil.rmtree(tmp_path / name, ignore_errors=True)


def run_job(script: str, args: list[str]) -> int:
    """The exit code of jobs/SCRIPT.py, run as Python runs it: warnings go to stderr, an exception ends with 1."""
    arguments = sys.argv
    sys.argv = [f"{script}.py", *args]
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *values, **_: print(warnings.formatwarning(*values[:4]), file=sys.stderr)
        try:
            runpy.run_path(str(JOBS / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            sys.argv = arguments
    return 0


def arguments(text: str, stored: Path) -> list[str]:
    return [word.replace("{s}", str(stored)) for word in shlex.split(text)]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below the folder: a file's bytes, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("case", [case.param() for case in CASES])
def test_bad_input_is_one_sentence_and_harms_nothing(
    case: Case, stored: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
):
    if case.live:
        request.getfixturevalue("cluster")
    case.damage(stored)
    before = tree(stored)
    capfd.readouterr()
    code = run_job(case.job, arguments(case.args, stored))
    out, err = capfd.readouterr()
    assert code == case.code, out + err
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    (line,) = (line for line in err.splitlines() if not line.startswith("WARNING: "))
    assert line.startswith(f"{case.job}.py: " if code == 2 else "error: ")
    missing = [word for word in case.words if word.replace("{s}", str(stored)) not in line]
    assert not missing, line
    assert not Path(TRACE).exists(), "a pickle from a checkpoint was executed"
    after = tree(stored)
    assert not [name for name, content in before.items() if name not in after or after[name] != content]
    assert not [name for name in after.keys() - before.keys() if not name.startswith(case.new or "/")]


@pytest.mark.parametrize(
    ("case", "damage"),
    [
        (train("", "--recipe deck_fann"), nothing),
        (train("", ""), cut(MANIFEST)),
        (resume("", ""), every(file_of(MODEL, cut))),
        (pictures("", ""), put(CAT, TEXT)),
        (pipeline("", "--recipes deck_fan deck_fan"), nothing),
        (weights("", "--path {s}/notes.txt"), nothing),
        (evaluate("", "--shards -1"), nothing),
    ],
    ids=lambda value: value.job if isinstance(value, Case) else "",
)
def test_debug_shows_the_traceback_before_the_sentence(
    case: Case, damage: Damage, stored: Path, capfd: pytest.CaptureFixture[str]
):
    damage(stored)
    assert run_job(case.job, [*arguments(case.args, stored), "--debug"]) == 1
    *lines, last = capfd.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert "Traceback (most recent call last):" in lines


@pytest.mark.parametrize(
    ("damage", "loaded", "fault"),
    [
        (nothing, "epoch-0001-step-000001", ""),
        (newest(file_of(MODEL, cut)), "epoch-0001-step-000000", "does not match its checksum"),
        (newest(file_of(META, cut)), "epoch-0001-step-000000", "meta.json is damaged"),
        (newest(file_of(META, digit_more("world_size"))), "epoch-0001-step-000000", "its own checksum"),
        (newest(file_of(META, removed)), "epoch-0001-step-000000", ""),  # cut off while it was written
        (newest(forged(OPTIMIZER, ARCHIVE)), "epoch-0001-step-000000", "not written by this program"),
        (newest(file_of(META, lambda name: updated(name, epoch="two"))), "epoch-0001-step-000000", "is damaged"),
    ],
    ids=[
        "sound",
        "weights cut off",
        "meta.json cut off",
        "a digit more",
        "no meta.json",
        "malicious",
        "epoch in words",
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(
    damage: Damage, loaded: str, fault: str, stored: Path, capfd: pytest.CaptureFixture[str]
):
    case = resume("", "")
    damage(stored)
    before = tree(stored)
    assert run_job(case.job, arguments(case.args, stored)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"would load {loaded}-attempt-0001" in out
    assert [fault in line for line in out.splitlines() if "PASSED OVER" in line] == [True] * bool(fault)
    assert not Path(TRACE).exists()
    assert tree(stored) == before
