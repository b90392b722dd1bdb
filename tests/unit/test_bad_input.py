"""What users get wrong: each job says it in one sentence, ends with an error and harms nothing that is stored.

Every case runs the real script, in this process so that torch and Ray are imported once, on a fresh copy of a small
data set, a stored run and some sources.
"""

import functools
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cifar_dist.config import prepare_environment
from cifar_dist.data import sources, store
from cifar_dist.recipes import recipe_config
from cifar_dist.storage import to_json
from cifar_dist.train.checkpoint import Checkpoints, Cursor, State

JOBS = Path(__file__).parents[2] / "jobs"
SECRET = "hunter2secret"  # in an argument: it must not be printed
TRACE = "trace"  # in the working folder: what a malicious pickle would make


# The stored things.


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_run(folder: Path) -> None:
    """runs/first as a training job leaves it in its second epoch; runs/empty before its first checkpoint."""
    from cifar_dist.train import plan

    config, data = recipe_config("quickstart_fan"), str(folder / "data")
    planned = plan.make_plan(config, plan.Launch(data, str(folder / "runs"), "first", recipe="quickstart_fan"))
    for name in ("first", "empty"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.json").write_bytes(to_json(planned.card))
    checkpoints = Checkpoints(str(folder / "runs" / "first"))
    optimizer: dict[str, Any] = {"optimizers": [{"state": {}, "param_groups": []}], "scaler": {}}
    for cursor in (Cursor(0, 1), Cursor(1, 0), Cursor(1, 1)):
        score = {"validation_accuracy": 0.5, "validation_loss": 1.0} if not cursor.step else None
        lines = [{"kind": "step", "global_step": i + 1} for i in range(2 * cursor.epoch + cursor.step)]
        # Nothing here looks into the weights: a small tensor keeps the copies small.
        state = State({"weight": torch.full((4, 3), float(len(lines)))}, None, {}, optimizer, lines)
        meta = {
            **plan.expected_of(config, planned.manifest),
            "global_step": len(lines),
            "metrics": score,
            "totals": [0.0, 0.0, 0.0],
            "num_averaged": 0,
            "config": config.to_dict(),
            "weights": None,
            "data_uri": data,
            "class_names": planned.manifest.class_names,
            "world_size": 1,
            "num_threads_per_worker": 1,
        }
        checkpoints.write(cursor, 1, state, meta)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, other (another data set), pictures and parquet (sources), runs and notes.txt, all sound."""
    folder = tmp_path_factory.mktemp("whole")
    for name, seed in (("data", 0), ("other", 1)):
        store.prepare(sources.shapes(60, 20, seed), str(folder / name))
    for name in ("cat", "dog"):
        (folder / "pictures" / "train" / name).mkdir(parents=True)
        for i in range(3):
            (folder / "pictures" / "train" / name / f"{i}.png").write_bytes(png(i))
    (folder / "parquet").mkdir()
    for split in ("train", "test"):
        shutil.copy(folder / "data" / f"{split}-00000.parquet", folder / "parquet")
    (folder / "notes.txt").write_text("mine")
    (folder / "nothing").mkdir()
    write_run(folder)
    return folder


# How they are damaged.

Damage = Callable[[Path], object]


def nothing(_: Path) -> None:
    """The stored things are sound, the command is not."""


def replaced(name: str, content: bytes | str) -> Damage:
    return lambda stored: (stored / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str, share: float = 0.5) -> Damage:
    """The first part of a file, as a copy that was broken off leaves it."""

    def act(stored: Path) -> None:
        content = (stored / name).read_bytes()
        (stored / name).write_bytes(content[: int(share * len(content))])

    return act


def flipped(name: str) -> Damage:
    """One bit in the middle."""

    def act(stored: Path) -> None:
        content = bytearray((stored / name).read_bytes())
        content[len(content) // 2] ^= 1
        (stored / name).write_bytes(content)

    return act


def removed(name: str) -> Damage:
    return lambda stored: shutil.rmtree(stored / name) if (stored / name).is_dir() else (stored / name).unlink()


def both(*damages: Damage) -> Damage:
    return lambda stored: [damage(stored) for damage in damages]


def edited(name: str, change: Callable[[dict], object]) -> Damage:
    """A JSON file with a change to its values."""

    def act(stored: Path) -> None:
        values = json.loads((stored / name).read_bytes())
        change(values)
        (stored / name).write_bytes(to_json(values))

    return act


def sealed(change: Callable[[dict], object], name: str = "data") -> Damage:
    """A manifest with a change and the right checksum, as another program may have written it."""

    def act(stored: Path) -> None:
        edited(f"{name}/manifest.json", change)(stored)
        values = json.loads((stored / name / "manifest.json").read_bytes())
        values["sha256"] = store.Manifest(**values).digest()
        (stored / name / "manifest.json").write_bytes(to_json(values))

    return act


def checkpoints_of(stored: Path) -> list[str]:
    return sorted(f"runs/first/checkpoints/{p.name}" for p in (stored / "runs" / "first" / "checkpoints").iterdir())


def in_all(damage: Callable[[str], Damage]) -> Damage:
    """The damage in every checkpoint of runs/first."""
    return lambda stored: [damage(name)(stored) for name in checkpoints_of(stored)]


def in_newest(damage: Callable[[str], Damage]) -> Damage:
    return lambda stored: damage(checkpoints_of(stored)[-1])(stored)


def meta(**values: Any) -> Damage:
    """Other values in the meta.json of every checkpoint."""
    return in_all(lambda name: edited(f"{name}/meta.json", lambda found: found.update(values)))


def forged(file: str, content: bytes | str | Callable[[], bytes]) -> Callable[[str], Damage]:
    """A file of a checkpoint with its right checksum, as whoever can write the folder can make it."""

    def in_one(name: str) -> Damage:
        made = content() if callable(content) else content
        made = made.encode() if isinstance(made, str) else made
        sha256 = hashlib.sha256(made).hexdigest()
        return both(
            replaced(f"{name}/{file}", made),
            edited(f"{name}/meta.json", lambda found: found["files"].update({file: sha256})),
        )

    return in_one


class Malicious:
    """Unpickling it makes the file TRACE in the working folder."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(TRACE),)


def malicious_pickle() -> bytes:
    return pickle.dumps(Malicious())


def malicious_archive() -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save({"optimizers": [Malicious()]}, buffer)
    return buffer.getvalue()


def picture(name: str, content: bytes) -> Damage:
    return replaced(f"pictures/train/{name}", content)


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PPM")
    return buffer.getvalue()


def folders(*names: str) -> Damage:
    return lambda stored: [(stored / name).mkdir(parents=True) for name in names]


def column(name: str, change: Callable[[pa.Table], pa.Array | pa.ChunkedArray | list | None]) -> Damage:
    """Another column in parquet/train-00000.parquet; None drops it."""

    def act(stored: Path) -> None:
        path = stored / "parquet" / "train-00000.parquet"
        table = pq.read_table(path)
        at, values = table.column_names.index(name), change(table)
        changed = table.remove_column(at) if values is None else table.set_column(at, name, values)
        pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)

    return act


def label(row: int, value: Any) -> Damage:
    def change(table: pa.Table) -> list:
        values = table["label"].to_pylist()
        values[row] = value
        return [values]

    return column("label", change)


def huggingface(text: str) -> Damage:
    def act(stored: Path) -> None:
        path = stored / "parquet" / "train-00000.parquet"
        pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)

    return act


def resealed_parquet(change: Callable[[pa.Table], pa.Table] | None) -> Damage:
    """data/train-00000.parquet changed (None: no Parquet at all), with the right checksums in the manifest."""

    def act(stored: Path) -> None:
        path = stored / "data" / "train-00000.parquet"
        if change is None:
            path.write_bytes(b"PAR1 this is no Parquet file PAR1")
        else:
            pq.write_table(change(pq.read_table(path)), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        sealed(lambda values: values["splits"]["train"]["files"][0].update(sha256=sha256))(stored)

    return act


def keras_file(name: str, **layers: dict[str, tuple[int, ...]]) -> Damage:
    """An HDF5 file with these layers: variable -> shape."""

    def act(stored: Path) -> None:
        with h5py.File(stored / name, "w") as file:
            for layer, variables in layers.items():
                for variable, shape in variables.items():
                    file.create_dataset(f"{layer}/{layer}/{variable}:0", data=np.zeros(shape, np.float32))

    return act


# The table.


@dataclass(frozen=True)
class Case:
    """`job` with `args`, in which {s} is the folder of the stored things, after `damage`.

    words: in the message. new: folders of what is stored in which the job may make files. cluster: it needs Ray.
    bug: why it fails as yet.
    """

    id: str
    job: str
    args: str
    words: tuple[str, ...]
    damage: Damage = nothing
    code: int = 1
    new: tuple[str, ...] = ()
    cluster: bool = False
    bug: str = ""

    def param(self) -> Any:
        marks = [pytest.mark.cluster] * self.cluster
        marks += [pytest.mark.xfail(strict=True, reason=self.bug)] * bool(self.bug)
        return pytest.param(self, id=f"{self.job}: {self.id}", marks=marks)


def job(name: str, base: str) -> Callable[..., Case]:
    """Cases of one job; an option given again overrides the one in `base`."""

    def case(id: str, args: str, *words: str, **rest: Any) -> Case:
        return Case(id, name, f"{base} {args}", words, **rest)

    return case


STORED = "--data {s}/data --storage {s}/runs"
train = job("train", f"--recipe quickstart_fan {STORED} --name new")
# The stored run continued, but for the running.
resume = job("train", f"--recipe quickstart_fan {STORED} --name first --explain-resume")
evaluate = job("evaluate", "--runs {s}/runs/first --data {s}/data --out out --staging-folder staged --shards 1")
shapes = job("prepare", "--source shapes --num-train 20 --num-test 20 --out out")
folder = job("prepare", "--source folder --path {s}/pictures --out out")
parquet = job("prepare", "--source parquet --path {s}/parquet --out out")
pipeline = job("pipeline", "--num-train 20 --num-test 20 --out out")
weights = job("weights", "")

resnet = "--recipe quickstart_resnet50v2"
EVIL_URI = f"s3://AKIAEXAMPLE:{SECRET}@bucket/runs"

OPTIONS = [
    train("an option misspelt", "--epoch 3", "unknown option --epoch", "--epochs", code=2),
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
    train("a negative seed", "--seed -1", "--seed", "from 0 to"),
    train("a seed too large", "--seed 4294967296", "--seed", "from 0 to", "4294967296"),
    train("a momentum above one", "--momentum 1.5", "--momentum", "1.5"),
    train("no validation", "--validation-fraction 0", "--validation-fraction", "from 0.0001 to 0.9"),
    train("all for validation", "--validation-fraction 1", "--validation-fraction", "from 0.0001 to 0.9"),
    train("keeping no checkpoints", "--keep-checkpoints 0", "--keep-checkpoints", "1 or more"),
    train("fan at 224 px", "--image-size 224", "fan", "--image-size must be 32, not 224"),
    train("resnet50v2 at 32 px", f"{resnet} --image-size 32", "resnet50v2", "--image-size of 96 or more, not 32"),
    train("fan has no base to fine-tune", "--finetune", "--finetune is for resnet50v2"),
    train("cutting the whole image out", "--cutout-size 32", "--cutout-size", "less than --image-size 32"),
    train("cropping beyond the image", "--crop-padding 40", "--crop-padding", "less than --image-size 32"),
    train("zero workers", "--workers 0", "--workers must be 1 or more", "not 0"),
    train("minus one worker", "--workers -1", "--workers must be 1 or more", "-1"),
    train("workers that are no number", "--workers x", "--workers", "'x'", "1:4", code=2),
    train("a range of workers cut off", "--workers 2:", "--workers", "'2:'", "1:4", code=2),
    train("a range of workers backwards", "--workers 3:1", "--workers", "3:1", "1:4"),
    train("a range of workers from zero", "--workers 0:2", "--workers", "0:2", "1:4"),
    train(
        "a batch smaller than the workers", "--workers 5 --global-batch-size 4", "--global-batch-size 4", "5 workers"
    ),
    train("failures below zero", "--max-failures -1", "--max-failures must be 0 or more, not -1"),
    train("no time for a collective", "--collective-timeout-seconds 0", "--collective-timeout-seconds", "1 or more"),
    train("resizing at no time", "--resize-seconds nan", "--resize-seconds", "1 or more, not nan"),
    train("a name with a folder in it", "--name team/first", "'team/first'", "--storage"),
    train("a name that leads outside", "--name ../first", "'../first'", "no run name"),
    train("a name that is the folder above", "--name ..", "'..'", "no run name"),
    train("an empty name", "--name ''", "--name ''", "no run name"),
    train("a name too long", f"--name {'n' * 101}", "no run name", "up to 100"),
    train("a name with a leading dash", "--name -first", "--name", "expected one argument", code=2),
    train("a name with a leading dash by =", "--name=-first", "'-first'", "beginning with a letter or digit"),
    train("a name with a space", "--name 'my run'", "'my run'", "no run name"),
]

PLACES = [
    train("empty storage", "--storage ''", "empty path or URI", "s3://bucket/folder"),
    train("storage of an unknown kind", "--storage foo://runs", "cannot open the URI foo://runs"),
    train("storage on the web", "--storage https://example.com/runs", "cannot open the URI https://example.com/runs"),
    train("storage without a bucket", "--storage s3://", "cannot open the URI s3://"),
    train("storage that is a file", "--storage {s}/notes.txt", "{s}/notes.txt/new"),
    train("a run that is a file", "--storage {s} --name notes.txt", "{s}/notes.txt"),
    train("credentials in the storage URI", f"--storage {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    train("credentials with a slash", f"--storage s3://AKIAEXAMPLE:a/{SECRET}@bucket/runs", "credentials"),
    train("credentials in the query", f"--storage s3://bucket/runs?secret_key={SECRET}", "s3://bucket/runs"),
    train("credentials in the data URI", f"--data {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    train("credentials in the weights URI", f"--weights {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    train("empty data", "--data ''", "empty path or URI"),
    train("data that are not there", "--data {s}/nowhere", "{s}/nowhere is no data set", "jobs/prepare.py"),
    train("data that are a file", "--data {s}/notes.txt", "{s}/notes.txt is no data set", "jobs/prepare.py"),
    train("data that are the source", "--data {s}/pictures", "{s}/pictures is no data set", "jobs/prepare.py"),
    train("data without a manifest", "", "no manifest.json", damage=removed("data/manifest.json")),
    train("data of an unknown kind", "--data foo://data", "cannot open the URI foo://data"),
]

SEE_MANIFEST = ("{s}/data/manifest.json", "prepare")
MANIFESTS = [
    train("an empty manifest", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", "")),
    train("a manifest cut off", "", *SEE_MANIFEST, "damaged", damage=cut("data/manifest.json")),
    train("a manifest that is no JSON", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", "{s}")),
    train("a manifest that is a list", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", "[1]")),
    train("a manifest that is null", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", "null")),
    train("a manifest of zeros", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", bytes(500))),
    train(
        "a manifest that is no text", "", *SEE_MANIFEST, "damaged", damage=replaced("data/manifest.json", b"\xff\x80")
    ),
    train(
        *("a manifest of another version", "", "format version 7", "reads 1", *SEE_MANIFEST),
        damage=edited("data/manifest.json", lambda values: values.update(format_version=7)),
    ),
    train(
        *("a manifest that lacks a key", "", "damaged", *SEE_MANIFEST),
        damage=edited("data/manifest.json", lambda values: values.pop("splits")),
    ),
    train(
        *("a manifest with a key too many", "", "damaged", *SEE_MANIFEST),
        damage=edited("data/manifest.json", lambda values: values.update(colour="red")),
    ),
    train(
        *("a manifest that was edited", "", "its own checksum", *SEE_MANIFEST),
        damage=edited("data/manifest.json", lambda values: values["class_names"].reverse()),
    ),
    train(
        "the manifest of another data set",
        "--name first",
        "first",
        "another data set",
        "--name",
        damage=both(removed("data"), lambda stored: (stored / "other").rename(stored / "data")),
    ),
    train("a manifest without a train split", "", "train", damage=sealed(lambda values: values["splits"].pop("train"))),
    train("more train images than there are", "--train-images 99", "--train-images is 99", "60 train images"),
    train(
        *("no class with two images", "", "validation", "2 train images"),
        damage=sealed(lambda values: values["splits"]["train"].update(num_rows_per_class=[1] * 10, num_rows=10)),
    ),
    train(
        *("decoded images of several sizes", "--cache decoded", "--cache decoded", "one size", "--cache auto"),
        damage=sealed(lambda values: values["splits"]["train"].update(height=[20, 32])),
    ),
]

CONFIG = "runs/first/config.json"
RUNS = [
    resume("another data set", "--data {s}/other", "first", "another data set", "use another --name"),
    resume("another batch size", "--global-batch-size 8", "global_batch_size=32, not 8", "another --name"),
    resume("another recipe", "--recipe deck_fan", "first was started with", "another --name"),
    resume("another network", resnet, "first was started with", "another --name"),
    resume("a config cut off", "", "{s}/" + CONFIG, "damaged", "another --name", damage=cut(CONFIG)),
    resume("an empty config", "", "{s}/" + CONFIG, "damaged", "another --name", damage=replaced(CONFIG, "")),
    resume("a config that is a list", "", "{s}/" + CONFIG, "damaged", damage=replaced(CONFIG, "[]")),
    resume("a config that is no text", "", "{s}/" + CONFIG, "damaged", damage=replaced(CONFIG, b"\xff\xfe\x00")),
    resume(
        *("a config that lacks a key", "", "{s}/" + CONFIG, "damaged"),
        damage=edited(CONFIG, lambda values: values.pop("manifest_sha256")),
    ),
    resume(
        *("a config with a section that is text", "", "{s}/" + CONFIG, "damaged"),
        damage=edited(CONFIG, lambda values: values["config"].update(loop="fast")),
    ),
    resume(
        *("a config with weights that are text", "", "{s}/" + CONFIG, "damaged"),
        damage=edited(CONFIG, lambda values: values.update(weights="imagenet")),
    ),
    resume(
        *("a run that was started from weights", "", "{s}/w.h5", "--weights that is not given", "another --name"),
        damage=lambda stored: edited(CONFIG, lambda v: v.update(weights={"uri": f"{stored}/w.h5", "sha256": "ab"}))(
            stored
        ),
    ),
]

SEE_CHECKPOINTS = ("no checkpoint", "{s}/runs/first/checkpoints/epoch-", "another --name")
MODEL, OPTIMIZER, META = "model.safetensors", "optimizer.pt", "meta.json"


def in_file(file: str, damage: Callable[[str], Damage]) -> Damage:
    return in_all(lambda name: damage(f"{name}/{file}"))


CHECKPOINTS = [
    resume("every meta.json cut off", "", META, "damaged", "remove", damage=in_file(META, cut)),
    resume("every meta.json empty", "", META, "damaged", damage=in_file(META, lambda name: replaced(name, ""))),
    resume("every meta.json a list", "", META, "damaged", damage=in_file(META, lambda name: replaced(name, "[]"))),
    resume("every meta.json null", "", META, "damaged", damage=in_file(META, lambda name: replaced(name, "null"))),
    resume("every meta.json without files", "", META, "damaged", damage=meta(files=None)),
    resume("every meta.json with files as a list", "", META, "damaged", damage=meta(files=[MODEL])),
    resume("every meta.json with few files", "", META, "damaged", damage=meta(files={MODEL: "ab"})),
    resume("every meta.json with an epoch in words", "", META, "damaged", damage=meta(epoch="two")),
    resume(
        "one meta.json with an epoch in words",
        "",
        META,
        "damaged",
        damage=in_newest(lambda name: edited(f"{name}/{META}", lambda found: found.update(epoch="two"))),
    ),
    resume("every meta.json with metrics in words", "", META, "damaged", damage=meta(metrics="good")),
    resume(
        "every meta.json without the workers",
        "",
        META,
        "damaged",
        damage=in_all(lambda name: edited(f"{name}/{META}", lambda found: found.pop("world_size"))),
    ),
    resume("checkpoints of another format", "", "format version 99", "--name", damage=meta(format_version=99)),
    resume("checkpoints of another model", "", "'resnet50v2'", "'fan'", "--name", damage=meta(model="resnet50v2")),
    resume("checkpoints of another class count", "", "num_classes 7", "10", "--name", damage=meta(num_classes=7)),
    resume("checkpoints of another data set", "", "manifest_sha256", "--name", damage=meta(manifest_sha256="ab" * 32)),
    resume("all weights cut off", "", *SEE_CHECKPOINTS, MODEL, "checksum", damage=in_file(MODEL, cut)),
    resume("a bit changed in all weights", "", *SEE_CHECKPOINTS, MODEL, "checksum", damage=in_file(MODEL, flipped)),
    resume("no weights in any checkpoint", "", *SEE_CHECKPOINTS, "lacks", MODEL, damage=in_file(MODEL, removed)),
    resume("a bit changed in all optimizer states", "", *SEE_CHECKPOINTS, damage=in_file(OPTIMIZER, flipped)),
    resume(
        "safetensors cut off with its checksum",
        "",
        *SEE_CHECKPOINTS,
        MODEL,
        "not written by this program",
        damage=in_all(forged(MODEL, b'\x40\0\0\0\0\0\0\0{"weight":')),
    ),
    resume(
        "safetensors that are none",
        "",
        *SEE_CHECKPOINTS,
        MODEL,
        "not written by this program",
        damage=in_all(forged(MODEL, b"\xff" * 64)),
    ),
    resume(
        "metrics that are no JSON",
        "",
        *SEE_CHECKPOINTS,
        "metrics.jsonl",
        "not written by this program",
        damage=in_all(forged("metrics.jsonl", "step 1\n")),
    ),
    resume(
        "metrics that are no text",
        "",
        *SEE_CHECKPOINTS,
        "metrics.jsonl",
        "not written by this program",
        damage=in_all(forged("metrics.jsonl", b"\xff\xfe")),
    ),
    resume(
        "a malicious pickle",
        "",
        *SEE_CHECKPOINTS,
        OPTIMIZER,
        "checksum",
        damage=in_file(OPTIMIZER, lambda name: replaced(name, malicious_pickle())),
    ),
    resume(
        "a malicious pickle with its checksum",
        "",
        *SEE_CHECKPOINTS,
        OPTIMIZER,
        "not written by this program",
        damage=in_all(forged(OPTIMIZER, malicious_pickle)),
    ),
    resume(
        "a malicious archive with its checksum",
        "",
        *SEE_CHECKPOINTS,
        OPTIMIZER,
        "not written by this program",
        damage=in_all(forged(OPTIMIZER, malicious_archive)),
    ),
    resume(
        "a malicious pickle as weights",
        "",
        *SEE_CHECKPOINTS,
        MODEL,
        "not written by this program",
        damage=in_all(forged(MODEL, malicious_pickle)),
    ),
    resume(
        "a malicious pickle beside them",
        "",
        *SEE_CHECKPOINTS,
        "extra.pkl",
        "not written by this program",
        damage=in_all(forged("extra.pkl", malicious_pickle)),
    ),
    resume(
        "a malicious pickle in the place of average.pt",
        "",
        *SEE_CHECKPOINTS,
        "not written by this program",
        damage=in_all(forged("average.pt", malicious_archive)),
    ),
    # Without --explain-resume: a run that seems finished is looked at before it is said to be.
    train(
        "a finished run that cannot be read",
        "--name first --epochs 1",
        *SEE_CHECKPOINTS,
        MODEL,
        damage=in_file(MODEL, cut),
    ),
    train(
        "a finished run of another model",
        "--name first --epochs 1",
        "'resnet50v2'",
        "--name",
        damage=meta(model="resnet50v2"),
    ),
]

FAN_FILE = "w.h5"
WEIGHTS = [
    train("weights that are not there", "--weights {s}/no.h5", "no file {s}/no.h5", "jobs/weights.py"),
    train("weights that are text", "--weights {s}/notes.txt", "{s}/notes.txt", "not a Keras weights file"),
    train("weights that are a folder", "--weights {s}/pictures", "{s}/pictures"),
    train("weights of an unknown kind", "--weights foo://w.h5", "cannot open the URI foo://w.h5"),
    train(
        "weights that are a checkpoint",
        "--weights {s}/w.pt",
        "{s}/w.pt",
        "not a Keras weights file",
        damage=lambda stored: (stored / "w.pt").write_bytes(malicious_archive()),
    ),
    train(
        "weights cut off",
        "--weights {s}/w.h5",
        "{s}/w.h5",
        "not a Keras weights file",
        damage=both(keras_file(FAN_FILE, conv2d={"kernel": (3, 3, 3, 64)}), cut(FAN_FILE)),
    ),
    train("weights without layers", "--weights {s}/w.h5", "{s}/w.h5 holds no layers", damage=keras_file(FAN_FILE)),
    train(
        "weights of too few layers",
        "--weights {s}/w.h5",
        "{s}/w.h5 lacks the layer",
        damage=keras_file(
            FAN_FILE, batch_normalization=dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (3,))
        ),
    ),
    train(
        "weights of other shapes",
        "--weights {s}/w.h5",
        "{s}/w.h5",
        "kernel",
        "[5, 5, 3, 7]",
        damage=keras_file(FAN_FILE, conv2d={"kernel": (5, 5, 3, 7), "bias": (7,)}),
    ),
    train(
        "weights of another network",
        f"{resnet} --weights {{s}}/w.h5",
        "{s}/w.h5",
        "lacks the layer",
        damage=keras_file(FAN_FILE, conv1_conv={"kernel": (7, 7, 3, 64), "bias": (64,)}),
    ),
]

TEXT = b"this is no picture"
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
    shapes("an empty out", "--out ''", "empty path or URI"),
    shapes("out of an unknown kind", "--out foo://data", "cannot open the URI foo://data"),
    shapes("credentials in out", f"--out {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    shapes("an out that is a file", "--out {s}/notes.txt", "{s}/notes.txt"),
    shapes("an out below a file", "--out {s}/notes.txt/data", "{s}/notes.txt"),
    shapes("another data set in out", "--out {s}/data --data-seed 5", "{s}/data already holds another", "--overwrite"),
    shapes(
        "a damaged manifest in out",
        "--out {s}/data",
        "{s}/data/manifest.json is damaged",
        "--overwrite",
        damage=cut("data/manifest.json"),
    ),
    shapes(
        "a manifest of another version in out",
        "--out {s}/data",
        "format version 2",
        "--overwrite",
        damage=edited("data/manifest.json", lambda values: values.update(format_version=2)),
    ),
    folder("no path", "--path ''", "(no --path)", "PATH/train/CLASS/IMAGE"),
    folder("no such folder", "--path {s}/nowhere", "{s}/nowhere", "no folder named train", "PATH/train/CLASS/IMAGE"),
    folder("a file for a folder", "--path {s}/notes.txt", "{s}/notes.txt", "PATH/train/CLASS/IMAGE"),
    folder("one folder too deep", "--path {s}/pictures/train", "{s}/pictures/train holds no folder named train"),
    folder(
        "a folder without classes", "--path {s}/flat", "{s}/flat/train holds 0 classes", damage=folders("flat/train")
    ),
    folder("a single class", "", "holds 1 classes", "2 or more", damage=removed("pictures/train/dog")),
    folder("an empty class", "", "'emu' has no images in {s}/pictures/train", damage=folders("pictures/train/emu")),
    folder(
        "a class with one image",
        "",
        "'emu' has fewer than 2 images",
        damage=both(folders("pictures/train/emu"), picture("emu/0.png", png(1))),
    ),
    folder("a class in test only", "", "'emu'", "{s}/pictures/test", damage=folders("pictures/test/emu")),
    folder(
        "a class without test images",
        "",
        "'dog' has no images in {s}/pictures/test",
        damage=both(folders("pictures/test/cat"), replaced("pictures/test/cat/0.png", png(1))),
    ),
    folder(
        "an image that is text", "", "{s}/pictures/train/cat/0.png", "--skip-bad", damage=picture("cat/0.png", TEXT)
    ),
    folder(
        "an image cut off", "", "{s}/pictures/train/cat/0.png", "--skip-bad", damage=cut("pictures/train/cat/0.png")
    ),
    folder(
        "an image with a changed bit",
        "",
        "{s}/pictures/train/cat/0.png",
        "--skip-bad",
        damage=flipped("pictures/train/cat/0.png"),
    ),
    folder(
        "an image of no bytes",
        "",
        "{s}/pictures/train/dog/1.png is empty",
        "--skip-bad",
        damage=picture("dog/1.png", b""),
    ),
    folder(
        "an image of another format",
        "",
        "{s}/pictures/train/cat/0.png is a PPM file",
        "PNG",
        "--skip-bad",
        damage=picture("cat/0.png", gif()),
    ),
    folder(
        "a class of bad images only",
        "--skip-bad",
        "'cat' has no usable images",
        damage=both(*(picture(f"cat/{i}.png", TEXT) for i in range(3))),
    ),
    folder("a folder among the images", "", "{s}/pictures/train/cat/more", damage=folders("pictures/train/cat/more")),
    folder("out in the source", "--out {s}/pictures/train/data", "--out", "source's own folder"),
    folder("out is the source", "--out {s}/pictures", "--out", "source's own folder"),
    parquet("no path", "--path ''", "needs --path"),
    parquet("no such folder", "--path {s}/nowhere", "{s}/nowhere holds no train*.parquet"),
    parquet("a folder without Parquet", "--path {s}/pictures", "{s}/pictures holds no train*.parquet"),
    parquet("a file for a folder", "--path {s}/parquet/train-00000.parquet", "{s}/parquet/train-00000.parquet"),
    parquet("credentials in the path", f"--path {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    parquet(
        "text with Parquet's name",
        "",
        "{s}/parquet/train-00000.parquet is not a readable Parquet file",
        damage=replaced("parquet/train-00000.parquet", "label,image"),
    ),
    parquet(
        "Parquet cut off",
        "",
        "{s}/parquet/train-00000.parquet is not a readable Parquet file",
        damage=cut("parquet/train-00000.parquet"),
    ),
    parquet(
        "Parquet of no bytes",
        "",
        "{s}/parquet/test-00000.parquet is not a readable Parquet file",
        damage=replaced("parquet/test-00000.parquet", ""),
    ),
    parquet(
        "no label column",
        "",
        "{s}/parquet/train-00000.parquet has the columns image",
        "label",
        damage=column("label", lambda _: None),
    ),
    parquet(
        "no image column",
        "",
        "{s}/parquet/train-00000.parquet has the columns label",
        "image",
        damage=column("image", lambda _: None),
    ),
    parquet(
        "images that are text",
        "",
        "column image is string",
        "struct<bytes",
        damage=column("image", lambda table: pa.array(["cat.png"] * len(table))),
    ),
    parquet(
        "labels that are text",
        "",
        "column label is string",
        "integers",
        damage=column("label", lambda table: pa.array(["cat"] * len(table))),
    ),
    parquet("a label out of range", "", "row 3 has the label 10", "0 to 9 are valid", damage=label(3, 10)),
    parquet("a negative label", "", "row 0 has the label -1", "0 to 9 are valid", damage=label(0, -1)),
    parquet("a missing label", "", "row 5 has the label None", "0 to 9 are valid", damage=label(5, None)),
    parquet("a label in the billions", "", "up to 3000000000", damage=both(label(3, 3_000_000_000), huggingface("{}"))),
    parquet(
        "damaged metadata",
        "",
        "{s}/parquet has Hugging Face metadata that cannot be read",
        damage=huggingface('{"info": '),
    ),
    parquet(
        "metadata that are a list",
        "",
        "{s}/parquet has Hugging Face metadata that cannot be read",
        damage=huggingface("[]"),
    ),
    parquet(
        "an image that is none",
        "",
        "train-00000.parquet row 0",
        "--skip-bad",
        damage=column("image", lambda table: pa.array([{"bytes": TEXT, "path": "a.png"}] * len(table))),
    ),
    parquet(
        "images without bytes",
        "",
        "train-00000.parquet row 0 is empty",
        "--skip-bad",
        damage=column(
            "image",
            lambda table: pa.array(
                [{"bytes": None, "path": "/etc/passwd"}] * len(table),
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
        ),
    ),
    Case(
        "CIFAR-10 in no folder", "prepare", "--source cifar10 --path {s}/nowhere --out out", ("{s}/nowhere", "--path")
    ),
    Case("CIFAR-10 in a file", "prepare", "--source cifar10 --path {s}/notes.txt --out out", ("{s}/notes.txt",)),
    Case("no source", "prepare", "--out out", ("required", "--source"), code=2),
    Case("no out", "prepare", "--source shapes", ("required", "--out"), code=2),
]

OTHER_JOBS = [
    pipeline("a recipe twice", "--recipes deck_fan deck_fan", "--recipes names one twice"),
    pipeline("an unknown recipe", "--recipes quickstart_fan best_fann", "unknown recipe 'best_fann'", "best_fan?"),
    pipeline("a setting that one recipe refuses", "--image-size 32", "resnet50v2", "--image-size of 96"),
    pipeline("zero workers", "--workers 0", "--workers must be 1 or more"),
    pipeline("an empty out", "--out ''", "empty path or URI"),
    pipeline("credentials in out", f"--out {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    pipeline("a source that is not there", "--source folder --path {s}/nowhere", "{s}/nowhere", "PATH/train"),
    pipeline("an option misspelt", "--recipe best_fan", "unknown option --recipe", "--recipes", code=2),
    pipeline("a file for out", "--out {s}/notes.txt", "{s}/notes.txt"),
    weights("a path that is not there", "--out out --path {s}/no.h5", "--path {s}/no.h5 is not a file"),
    weights("a folder for a path", "--out out --path {s}/pictures", "--path {s}/pictures is not a file"),
    weights("another file", "--out out --path {s}/notes.txt", "{s}/notes.txt is not the expected file", "md5"),
    weights(
        "no weights but the right checksum",
        f"--out out --path {{s}}/notes.txt --md5 {hashlib.md5(b'mine').hexdigest()}",
        "{s}/notes.txt is not a Keras weights file",
    ),
    weights("an empty out", "--out '' --path {s}/notes.txt", "empty path or URI"),
    weights("no out", "--path {s}/notes.txt", "required", "--out", code=2),
    weights(
        "a mirror that does not answer", "--out out --url http://127.0.0.1:1/w.h5", "http://127.0.0.1:1/w.h5", "--path"
    ),
    evaluate("a negative number of shards", "--shards -1", "--shards must be 1 or more, not -1"),
    evaluate("shards that are no number", "--shards x", "--shards", "'x'", code=2),
    evaluate("an unknown split", "--splits valid", "--splits", "'valid'", "did you mean validation", code=2),
    evaluate("no runs", "--runs", "--runs", "expected at least one argument", code=2),
    evaluate("no such cluster", "--address 127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
    train("no such cluster", "--address nowhere:6379", "no Ray cluster answers at nowhere:6379"),
]

LIVE = [  # on a real Ray cluster of 2 CPUs
    evaluate("a run that is not there", "--runs {s}/runs/second", "{s}/runs/second has no checkpoint", "train it"),
    evaluate("a run without checkpoints", "--runs {s}/runs/empty", "{s}/runs/empty has no checkpoint", "train it"),
    evaluate("an empty run", "--runs ''", "empty path or URI"),
    evaluate("a run that is a file", "--runs {s}/notes.txt", "{s}/notes.txt"),
    evaluate("one run twice", "--runs {s}/runs/first {s}/runs/first/", "must differ in name", "first, first"),
    evaluate("another data set", "--data {s}/other", "{s}/runs/first was trained on another data set"),
    evaluate("no data set", "--data {s}/nothing", "{s}/nothing is no data set", "jobs/prepare.py"),
    evaluate("a manifest cut off", "", *SEE_MANIFEST, "damaged", damage=cut("data/manifest.json")),
    evaluate("every meta.json cut off", "", META, "damaged", damage=in_file(META, cut)),
    evaluate("credentials in out", f"--out {EVIL_URI}", "credentials", "AWS_SECRET_ACCESS_KEY"),
    evaluate("more GPUs than exist", "--device gpu", "GPU", "the cluster has 0", "--device cpu"),
    evaluate(
        "Parquet missing",
        "",
        "{s}/data/train-00000.parquet",
        "missing",
        "prepare",
        damage=removed("data/train-00000.parquet"),
    ),
    evaluate(
        "Parquet cut off",
        "",
        "{s}/data/test-00000.parquet",
        "checksum",
        "prepare",
        damage=cut("data/test-00000.parquet"),
    ),
    evaluate(
        "Parquet with a changed bit",
        "",
        "{s}/data/train-00000.parquet",
        "checksum",
        "prepare",
        damage=flipped("data/train-00000.parquet"),
    ),
    evaluate(
        "Parquet of another data set",
        "",
        "{s}/data/train-00000.parquet",
        "checksum",
        "prepare",
        damage=lambda stored: shutil.copy(stored / "other" / "train-00000.parquet", stored / "data"),
    ),
    train(
        "more GPUs than exist", "--device gpu --workers 2", "2 workers need a GPU each", "the cluster has 0", "--device"
    ),
    train(
        "more workers than cores", "--workers 3", "3 workers need a CPU each", "the cluster has 2", "lower --workers"
    ),
    train(
        "no place to stage",
        "--staging-folder {s}/notes.txt/x",
        "preflight failed",
        "--staging-folder",
        new=("runs/new",),
    ),
]

CASES = OPTIONS + PLACES + MANIFESTS + RUNS + CHECKPOINTS + WEIGHTS + PREPARE + OTHER_JOBS
CASES += [Case(**{**vars(case), "cluster": True}) for case in LIVE]


# Running them.


@pytest.fixture(scope="module", autouse=True)
def jobs_environment() -> Iterator[None]:
    """jobs/ can be imported, as it can beside a script that runs; the environment is put back."""
    before, path = dict(os.environ), list(sys.path)
    sys.path.insert(0, str(JOBS))
    prepare_environment()  # Ray reads it when it is imported
    yield
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from cifar_dist.train import launch

    launch.connect(None, 2)  # the jobs find it connected
    yield
    ray.shutdown()


@pytest.fixture
def stored(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the stored things; the working folder is another one, and empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path(shutil.copytree(whole, tmp_path / "stored"))


def run_job(script: str, args: list[str]) -> int:
    """The exit code of jobs/SCRIPT.py, run as Python runs it."""
    arguments = sys.argv
    sys.argv = [f"{script}.py", *args]
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


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below the folder: a file's bytes, None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("case", [case.param() for case in CASES])
def test_bad_input_is_one_sentence_and_harms_nothing(
    case: Case, stored: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
):
    if case.cluster:
        request.getfixturevalue("cluster")
    case.damage(stored)
    before = tree(stored)
    capfd.readouterr()
    code = run_job(case.job, [word.replace("{s}", str(stored)) for word in shlex.split(case.args)])
    out, err = capfd.readouterr()
    if os.environ.get("SHOW"):
        with open(os.environ["SHOW"], "a") as f:
            f.write(
                f"{case.job}: {case.id} -> {code}: {err if len(err) < 1500 else err[-1500:]}".replace(str(stored), "S")
                + "\n"
            )
    assert code == case.code, out + err
    assert "Traceback" not in out + err
    assert SECRET not in out + err
    (line,) = err.splitlines()
    assert line.startswith(f"{case.job}.py: " if code == 2 else "error: ")
    missing = [word for word in (w.replace("{s}", str(stored)) for w in case.words) if word not in line]
    assert not missing, line
    assert not Path(TRACE).exists(), "a pickle from a checkpoint was executed"
    after = tree(stored)
    changed = {name for name, content in before.items() if name not in after or after[name] != content}
    made = {name for name in after.keys() - before.keys() if not name.startswith(case.new or ("\0",))}
    assert not changed | made
