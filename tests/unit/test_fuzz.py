"""Whatever becomes of stored files, reading them gives one sentence, an older state or the same content.

FUZZ_SECONDS=600 FUZZ_SEED=7 fuzzes longer and otherwise; FUZZ_CASE=GROUP:AREA:SEED:NUMBER, which a failure names,
repeats one case. Below are tests of the faults that were found so, a kind each.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoint_states import EXPECT, put_meta, tree, write
from mutations import deep, sha256, torch_file

from cifar_dist.config import Config
from cifar_dist.data import parts, sources, store
from cifar_dist.data.manifest import MANIFEST, read_manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import STAGED, DataSet
from cifar_dist.errors import UserError
from cifar_dist.evaluate.report import lines_of
from cifar_dist.launch.plan import check_stored
from cifar_dist.models.keras_weights import load_keras_weights
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.log import LOG, read_lines
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import from_json, seal, to_json
from cifar_dist.storage import Folder

GROUPS = ("data", "sources", "runs", "weights")
SECONDS = float(os.environ.get("FUZZ_SECONDS", "24")) / len(GROUPS)
SEED = os.environ.get("FUZZ_SEED", "0")
ONE = os.environ.get("FUZZ_CASE", "")
START_SECONDS = 150  # until the first case, on a busy machine


def fuzz(folder: Path, group: str, seed: str, seconds: float, one: str = "") -> str:
    """What is wrong, empty if nothing is. Another process reads, as some files may end it by a signal."""
    arguments = [Path(__file__).with_name("fuzzing.py"), folder / "work", group, seed, seconds, *[one] * bool(one)]
    (folder / "work").mkdir()
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=output, stderr=output)
        try:
            code = process.wait(START_SECONDS + seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    cases = [line for line in lines if line.startswith("case ")]
    last = cases[-1].removeprefix("case ") if cases else "none"
    rest = "\n".join(line for line in lines if line not in set(cases))
    if code == 0 and lines[-1].startswith("done") and cases:
        return ""
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return f"{group}: {how}, last case FUZZ_CASE={last}\n{rest}"


@pytest.mark.timeout(START_SECONDS + SECONDS + 60)
@pytest.mark.parametrize("group", GROUPS)
def test_damage_is_one_sentence_an_older_state_or_the_same_content(group: str, tmp_path: Path):
    seed, one = SEED, ""
    if ONE:
        name, area, seed, number = ONE.split(":")
        one = f"{area}:{number}"
        if name != group:
            pytest.skip(f"FUZZ_CASE is of {name}")
    if fault := fuzz(tmp_path, group, seed, SECONDS, one):
        pytest.fail(fault, pytrace=False)


@pytest.mark.parametrize(
    ("area", "words"),
    [
        ("sound", ""),
        ("signal", "ended by SIGSEGV, last case FUZZ_CASE=deadly:signal:7:0"),
        ("hang", "Timeout"),
        ("memory", "MiB of memory"),
        ("exception", "KeyError: 'missing'"),
        ("elsewhere", "a file elsewhere was changed"),
    ],
)
def test_what_the_fuzz_test_calls_a_failure(area: str, words: str, tmp_path: Path):
    fault = fuzz(tmp_path, "deadly", "7", 1.0, f"{area}:0")
    assert words in fault
    assert bool(fault) == bool(words)


# Faults that were found so.


def sentence_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    (line,) = str(caught.value).splitlines()
    return line


NESTED = b'{"a": ' + b"[" * 100_000
ODD_JSON = {
    "nested too deep to parse": NESTED,
    "nested too deep to write": to_json({"a": deep(200)}),
    "no object": b"[1]",
    "NaN for null": b'{"a": NaN}',
    "an infinite number": b'{"a": [1e999]}',
    "a number of 1329 bits": b'{"a": 1' + b"0" * 400 + b"}",
    "a number of too many digits": b'{"a": 1' + b"0" * 9000 + b"}",
    "half a character": rb'{"a": "\ud800"}',
    "half a character for a key": rb'{"\ud800": 1}',
    "no UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("content", ODD_JSON.values(), ids=ODD_JSON)
def test_json_that_the_project_does_not_write_is_no_value(content: bytes):
    with pytest.raises(ValueError):  # noqa: PT011 - of many kinds, all of which the readers know
        from_json(content)


def test_json_that_the_project_writes_is_read_as_it_was():
    values = {"a": [1, -(2**63), 2**64 - 1, 0.5, None, True, "ä\n"], "b": {"c": deep(40)}}
    assert from_json(to_json(values)) == values


@pytest.mark.parametrize("content", [NESTED, ODD_JSON["NaN for null"]], ids=["nested", "NaN"])
def test_every_reader_of_json_refuses_it(content: bytes, tmp_path: Path):
    (tmp_path / "_manifest.json").write_bytes(content)
    assert "is damaged" in sentence_of(lambda: read_manifest(str(tmp_path)))
    run = tmp_path / "run"
    name = write(Checkpoints(str(run)), 1).name
    (run / "checkpoints" / name / "meta.json").write_bytes(content)
    assert "meta.json is damaged" in sentence_of(Checkpoints(str(run)).all)
    (run / LOG).write_bytes(content + b"\n")
    assert "is damaged" in sentence_of(lambda: read_lines(Folder(str(run))))
    (run / "config.json").write_bytes(content)
    card = {"manifest_sha256": "", "weights": None, "config": Config().to_dict()}
    assert "config.json is damaged" in sentence_of(lambda: check_stored(card, Run(str(tmp_path / "run")), ""))
    attempts = Attempts(Folder(str(run)), "0123456789abcdef")
    attempts.claim(takeover=True)
    (claim,) = (run / "attempts").iterdir()
    claim.write_bytes(content)
    assert "by another job" in sentence_of(attempts.refuse)


def test_a_user_error_is_one_line_without_control_characters():
    assert str(UserError("a\nb\r\nc\u2028d\x1b[31me ä \ud800")) == "a b  c d?[31me ä ?"


def sealed_manifest(folder: Path, change: Callable[[dict], object]) -> Path:
    """A data set whose manifest was edited and sealed again. It has two files of train and one of test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROWS_PER_FILE", 30)
        store.prepare(sources.shapes(60, 30), str(folder))
    values = json.loads((folder / MANIFEST).read_bytes())
    change(values)
    (folder / MANIFEST).write_bytes(to_json(seal(values)))
    return folder


def first_file(values: dict) -> dict[str, Any]:
    return values["splits"]["train"]["files"][0]


def swapped(*names: str) -> Callable[[dict], object]:
    def change(values: dict) -> None:
        one, other = values["splits"]["train"]["files"]
        for name in names:
            one[name], other[name] = other[name], one[name]

    return change


FALSE_WORDS: dict[str, Callable[[dict], object]] = {
    "no list of class names": lambda v: v.update(class_names="abcdefghij"),
    "other class names": lambda v: v["class_names"].reverse(),
    "one more class": lambda v: v["class_names"].append("more"),
    "a source that is no text": lambda v: v.update(source=[1]),
    "a split of another name": lambda v: v["splits"].update(valid=v["splits"]["test"]),
    "a word too many": lambda v: v["splits"]["train"].update(colour="red"),
    "a word too many of a file": lambda v: first_file(v).update(colour="red"),
    "a word too few": lambda v: v["splits"]["train"].pop("height"),
    "one number for a size": lambda v: v["splits"]["train"].update(width=[32]),
    "rows of classes swapped": lambda v: v["splits"]["train"].update(num_rows_per_class=[5, 7] + [6] * 8),
    "rows of a file": lambda v: (first_file(v).update(num_rows=29), v["splits"]["train"].update(num_rows=59)),
    "rows that are no number": lambda v: v["splits"]["train"].update(num_rows=60.0),
    "rows moved to another file": lambda v: [
        f.update(num_rows=n) for f, n in zip(v["splits"]["train"]["files"], (29, 31), strict=True)
    ],
    "bytes of a file": lambda v: first_file(v).update(num_bytes=5),
    "a checksum that is none": lambda v: first_file(v).update(sha256="ab"),
    "another checksum of the rows": lambda v: first_file(v).update(rows_sha256="ab" * 32),
    "a file in another folder": lambda v: first_file(v).update(name="../train-00000.parquet"),
    "a file twice": lambda v: v["splits"]["train"]["files"][1].update(first_file(v)),
    "files in another order": swapped("name", "num_rows", "num_bytes", "sha256", "rows_sha256"),
    "no files": lambda v: v["splits"]["train"].update(files=[]),
    "files that are a text": lambda v: v["splits"]["train"].update(files="train-00000.parquet"),
}


@pytest.mark.parametrize("change", FALSE_WORDS.values(), ids=FALSE_WORDS)
def test_a_sealed_manifest_that_says_something_else_is_refused(
    change: Callable[[dict], object], tmp_path: Path, staging_folder: Path
):
    folder = sealed_manifest(tmp_path / "data", change)
    line = sentence_of(lambda: DataSet.open(str(folder), Staging(folder=staging_folder)).stage("train"))
    assert str(folder) in line
    assert "prepare" in line
    assert not list(staging_folder.rglob("*.arrow"))


@pytest.mark.parametrize("cache", ["decoded", "encoded"])
@pytest.mark.parametrize("real", [32, 40])
def test_a_sealed_manifest_of_other_sizes_is_refused_when_images_are_decoded(
    cache: str, real: int, tmp_path: Path, staging_folder: Path
):
    """Sizes decide what is cached and whether images are resized: a network would be given others."""
    from cifar_dist.data.loader import Loader
    from cifar_dist.data.order import ImageSpec, eval_plans

    told = 72 - real
    items = [sources.Item(f"{i}.png", i % 2, lambda: np.zeros((real, real, 3), np.uint8)) for i in range(6)]
    store.prepare(sources.Source.of("grey", ["a", "b"], {"train": items, "test": items}), str(tmp_path / "data"))
    path = tmp_path / "data" / MANIFEST
    values = json.loads(path.read_bytes())
    values["splits"]["train"] |= {"height": [told, told], "width": [told, told]}
    path.write_bytes(to_json(seal(values)))
    data = DataSet.open(str(tmp_path / "data"), Staging(folder=staging_folder))
    settings = {"device": torch.device("cpu"), "num_threads": 1, "max_batch_size": 4, "cache": cache}
    settings["cache_budget_mib"] = 100

    def read() -> None:
        for batch in Loader(data, "train", ImageSpec(image_size=32), **settings).batches(
            eval_plans(np.arange(6), 4, 0, 1)
        ):
            assert batch.images.shape[2:] == (32, 32)

    if cache == "encoded" and told != 32:  # every image is resized, whatever its size
        read()
        return
    line = sentence_of(read)
    assert f"0.png (row 0 of train) has {real} x {real} pixels, the manifest says {told} x {told}" in line


def test_a_staged_file_with_missing_values_is_copied_again(shapes_uri: str, staging_folder: Path):
    wanted = DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("test").labels.copy()
    (path,) = staging_folder.rglob("test.arrow")
    reader = pa.ipc.open_file(pa.BufferReader(path.read_bytes()))
    batch = reader.get_batch(0)
    forged = pa.record_batch([batch["bytes"], batch["path"], pa.array([None] * len(batch), pa.int64())], schema=STAGED)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, STAGED) as writer:
        writer.write_batch(forged)
    assert np.array_equal(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("test").labels, wanted)


@pytest.mark.parametrize("target", ["nowhere", "test-00000.parquet"])
def test_a_link_that_leads_nowhere_is_no_missing_test_split(target: str, shapes_uri: str, tmp_path: Path):
    """Else a test split would be drawn from train, without a word."""
    (tmp_path / "train-00000.parquet").write_bytes(Path(shapes_uri, "train-00000.parquet").read_bytes())
    (tmp_path / "test-00000.parquet").symlink_to(target)
    line = sentence_of(lambda: sources.find_source("parquet", str(tmp_path)))
    assert f"{tmp_path}/test-00000.parquet cannot be read" in line


def test_a_data_set_with_a_file_that_leads_nowhere_is_not_whole(tmp_path: Path):
    store.prepare(sources.shapes(20, 20), str(tmp_path))
    (tmp_path / "test-00000.parquet").unlink()
    (tmp_path / "test-00000.parquet").symlink_to("nowhere")
    assert store.whole(str(tmp_path), "shapes") is None


@pytest.mark.parametrize("names", ["abc", [1, 2, 3], {"a": 0}], ids=str)
def test_class_names_of_a_source_that_are_no_names_are_refused(names: Any, tmp_path: Path):
    images = [{"bytes": sources.encode_png(sources.draw_shape(i, (i,))), "path": ""} for i in range(3)]
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    table = pa.table({"image": images, "label": [0, 1, 2]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "train-00000.parquet")
    assert "no list of names" in sentence_of(lambda: sources.find_source("parquet", str(tmp_path)))


def test_weights_with_a_damaged_heap_are_refused(tmp_path: Path):
    """HDF5 never comes to the end of a heap in which an object has a wrong size."""
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["dense/kernel:0"], file.attrs["layer_names"] = np.zeros((2, 3), np.float32), ["dense"]
        file.attrs["model_config"] = "{}"
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    second = heap + 16 + 16 + 8  # behind "dense": its number, uses and size
    assert content[second : second + 2] == b"\x02\0"
    network = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False))
    for size in (0, 1, 8, 64, 2136, 4000, 2**32, 2**64 - 1):
        path.write_bytes(content[: second + 8] + size.to_bytes(8, "little") + content[second + 16 :])
        if size not in (1, 8):  # 2 bytes take 8
            assert f"byte {heap} begins a damaged heap" in sentence_of(lambda: load_keras_weights(network, path))
    path.write_bytes(content)
    assert load_keras_weights(network, path) == 1


# Checkpoints.


ODD_META: dict[str, dict[str, Any]] = {
    "an accuracy in words": {"metrics": {"validation_accuracy": "good", "validation_loss": 1.0}},
    "a list for an accuracy": {"metrics": {"validation_accuracy": [1], "validation_loss": None}},
    "a file in another folder": {"files": {"model.safetensors": "", "optimizer.pt": "", "../x.safetensors": ""}},
    "a file for the log's mark": {"files": {"model.safetensors": "", "optimizer.pt": "", "log.safetensors": ""}},
    "a mark of another kind": {"log": {"bytes": 1}},
    "a mark in words": {"log": {"num_bytes": "many", "sha256": ""}},
    "no workers": {"world_size": "two"},
    "settings in a list": {"config": {"optim": [1]}},
    "steps in words": {"global_step": "many"},
    "totals in words": {"totals": "many"},
    "weights in words": {"weights": "imagenet"},
    "class names that are numbers": {"class_names": [1, 2]},
}


@pytest.mark.parametrize("changed", ODD_META.values(), ids=ODD_META)
def test_a_sealed_meta_json_that_no_job_wrote_is_passed_over(changed: dict[str, Any], tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    for epoch in (1, 2, 3):
        write(checkpoints, epoch, score=(0.5, 1.0))
    path = tmp_path / "checkpoints" / "epoch-0003-step-000000-attempt-0001" / "meta.json"
    put_meta(path, {**json.loads(path.read_bytes()), **changed})
    noted: dict[str, str] = {}
    found = checkpoints.load_newest(EXPECT, noted.__setitem__)
    assert found
    assert found[0].name == "epoch-0002-step-000000-attempt-0001"
    assert "meta.json is damaged" in noted[path.parent.name]
    assert checkpoints.best() == found[0]
    checkpoints.keep(1, 9)
    assert path.exists()


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        [1],
        {"optimizers": [], "scaler": 1},
        {"optimizers": {}, "scaler": {}},
        {"optimizers": [1], "scaler": {}},
    ],
    ids=str,
)
def test_an_optimizer_state_of_another_shape_is_passed_over(value: Any, tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path))
    older, newest = write(checkpoints, 1), write(checkpoints, 2)
    folder = tmp_path / "checkpoints" / newest.name
    (folder / "optimizer.pt").write_bytes(torch_file(value))
    files = {**newest.meta["files"], "optimizer.pt": sha256((folder / "optimizer.pt").read_bytes())}
    put_meta(folder / "meta.json", {**newest.meta, "files": files})
    found = checkpoints.load_newest(EXPECT)
    assert found
    assert found[0] == older


def test_of_a_checkpoint_that_is_a_link_the_link_is_deleted(tmp_path: Path):
    checkpoints = Checkpoints(str(tmp_path / "run"))
    for epoch in (1, 2):
        write(checkpoints, epoch)
    name = write(Checkpoints(str(tmp_path / "other")), 0).name
    linked, before = tmp_path / "run" / "checkpoints" / name, tree(tmp_path / "other")
    linked.symlink_to(tmp_path / "other" / "checkpoints" / name)
    checkpoints.keep(1, 9)
    assert not linked.is_symlink()
    assert tree(tmp_path / "other") == before


ODD_LINES = {
    "no kind": {"global_step": 1},
    "a kind that is a list": {"kind": ["epoch"], "global_step": 1},
    "no step": {"kind": "epoch"},
    "an epoch without its loss": {"kind": "epoch", "global_step": 1, "train_accuracy": 0.5},
    "a loss in words": {"kind": "step", "global_step": 1, "train_loss": "low", "train_accuracy": 0.5},
    "a warning without its message": {"kind": "warning", "global_step": 1},
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
def test_a_line_of_the_log_that_no_job_wrote_is_refused(line: dict[str, Any], tmp_path: Path):
    good = {"kind": "step", "global_step": 1, "train_loss": None, "train_accuracy": 0.5}
    (tmp_path / LOG).write_text(json.dumps(good) + "\n")
    assert read_lines(Folder(str(tmp_path))) == [good]
    (tmp_path / LOG).write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    assert f"{LOG} is damaged" in sentence_of(lambda: lines_of(Run(str(tmp_path))))
