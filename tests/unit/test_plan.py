"""What a run is to do: launches, settings, data and stored runs that do not fit are refused, and nothing is written."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from cifar_dist import models
from cifar_dist.config import Config, option_fields
from cifar_dist.data import manifest, sources, store
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.launch.plan import check_stored, explain_resume, make_plan
from cifar_dist.models.keras_weights import base_layers, tensors_of
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState, Cursor
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.network import expected_of
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import seal, to_json
from cifar_dist.storage import Folder

EPOCHS = 3


def contents(folder: Path) -> dict[str, str]:
    """Every file below the folder with its hash and every folder; nothing is written if it stays equal."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def refusal(action: Callable[[], object], *words: str) -> str:
    """The one line that a refused action says."""
    with pytest.raises(UserError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


# Launches.


def launch(**values) -> Launch:
    return Launch(**{"recipe": "deck_fan", "data": "data", "storage": "runs", "name": "run", **values})


@pytest.mark.parametrize("given", ["0", "-1", "3:1", "0:2", "0:0"])
def test_workers_that_cannot_be_are_refused(given):
    text = refusal(lambda: launch(workers=given))
    assert text == f"--workers must be 1 or more, or a range such as 1:4, not {given}"


@pytest.mark.parametrize(("most", "least"), [(1, None), (64, None), (1, 1), (4, 1), (4, 4)])
def test_workers_that_can_be_are_not(most, least):
    found = launch(workers=str(most) if least is None else f"{least}:{most}")
    assert (found.num_workers, found.min_workers) == (most, least)


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "/a", "../a", "..", ".hidden", "-a", "_a", "a b", "a\\b", "a\n", "a?x=1", "s3://b", "ä", "a" * 101],
)
def test_name_that_is_not_one_folder_is_refused(name):
    refusal(lambda: launch(name=name), f"--name {name!r} is no run name", "a folder goes into --storage")


@pytest.mark.parametrize("name", ["a", "7", "first-run_2.b", "a" * 100])
def test_name_of_a_folder_is_taken(name):
    assert launch(storage="s3://bucket/runs?region=x", name=name).run_uri == f"s3://bucket/runs/{name}?region=x"


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("max_failures", [-1], [0, 5]),
        ("collective_timeout_seconds", [0, -120], [1, 3600]),
        ("resize_seconds", [0.0, 0.5, -1.0, math.nan], [1.0, 60.0]),
    ],
)
def test_limits_that_are_too_small_are_refused(name, bad, good):
    for value in bad:
        refusal(lambda value=value: launch(**{name: value}), f"--{name.replace('_', '-')} must be", f"not {value}")
    for value in good:
        assert getattr(launch(**{name: value}), name) == value


def test_relative_storage_is_of_the_folder_the_job_is_started_in(tmp_path, monkeypatch):
    """Workers run in another one."""
    monkeypatch.chdir(tmp_path)
    assert launch(storage="runs", name="first").run_uri == f"{tmp_path}/runs/first"


# Plans.


@pytest.fixture
def planned(shapes_uri, tmp_path) -> Callable:
    """Makes a plan of the run tmp_path/runs/run, by name of a launch's or a configuration's setting."""

    def act(**values):
        mine = {f.name: values.pop(f.name) for f in dataclasses.fields(Launch) if f.name in values}
        config = Config().replace(**{"epochs": EPOCHS, **values})
        return make_plan(config, launch(**{"data": shapes_uri, "storage": str(tmp_path / "runs"), **mine}))

    return act


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "runs" / "run"


def stored_with(run: Path, plan, **settings) -> None:
    run.mkdir(parents=True, exist_ok=True)
    card = json.loads(to_json(plan.card))
    for name, value in settings.items():
        card["config"][option_fields()[name][0]][name] = value
    (run / "config.json").write_bytes(to_json(seal(card)))


def test_plan_holds_what_config_json_is_to_say(planned, shapes_uri, tmp_path):
    plan = planned(workers="1:2", recipe="quickstart_fan", seed=7)
    assert plan.data.manifest == manifest.read_manifest(shapes_uri)
    assert (plan.data.uri, plan.weights, plan.is_finished) == (shapes_uri, None, False)
    card = json.loads(to_json(plan.card))
    assert Config.from_dict(card["config"]) == plan.config == Config().replace(epochs=EPOCHS, seed=7)
    assert (card["manifest_sha256"], card["recipe"], card["num_workers"]) == (
        plan.data.manifest.sha256,
        "quickstart_fan",
        2,
    )
    assert contents(tmp_path) == {}


def test_plan_of_a_stored_run_writes_nothing(planned, run, tmp_path, shapes_uri):
    stored_with(run, planned())
    before, data = contents(tmp_path), contents(Path(shapes_uri))
    planned()
    assert (contents(tmp_path), contents(Path(shapes_uri))) == (before, data)


FREE = {
    *("epochs", "weights", "cache", "cache_budget_mib", "dali_threads", "log_every_steps", "chance_warning_steps"),
    *("features", "record_samples", "checkpoint_every_steps", "checkpoint_every_seconds", "storage_retry_seconds"),
    *("keep_checkpoints", "cuda_graph"),
}


@pytest.mark.parametrize("name", option_fields())
def test_stored_run_goes_on_with_other_values_only_of_what_is_not_learned_from(name, planned, run, tmp_path):
    """Written out, so that a setting that becomes free is noticed."""
    plan = planned()
    stored_with(run, plan, **{name: "another value"})
    before = contents(tmp_path)
    if name in FREE:
        assert planned().card == plan.card
    else:
        value = getattr(getattr(plan.config, option_fields()[name][0]), name)
        text = refusal(planned, f"the run run was started with {name}=another value, not {value}", "another --name")
        assert "use the same setting" in text
    assert contents(tmp_path) == before


def test_setting_that_the_stored_run_did_not_know_was_at_its_default(planned, run):
    """A run of an earlier version goes on, but not with another value."""
    plan = planned()
    card = json.loads(to_json(plan.card))
    del card["config"]["optim"]["clip_norm"]
    run.mkdir(parents=True)
    (run / "config.json").write_bytes(to_json(seal(card)))
    assert planned().card == plan.card
    refusal(lambda: planned(clip_norm=1.5), "was started with clip_norm=0.0, not 1.5")


def test_run_of_another_data_set_is_refused(planned, run, tmp_path):
    stored_with(run, planned())
    store.prepare(sources.shapes(40, 20, seed=1), str(tmp_path / "other"))
    before = contents(tmp_path)
    refusal(lambda: planned(data=str(tmp_path / "other")), "the run run was started on another data set", "--name")
    assert contents(tmp_path) == before


def test_same_data_set_in_another_place_is_the_same(planned, run, tmp_path):
    stored_with(run, planned())
    store.prepare(sources.shapes(200, 100), str(tmp_path / "copy"))
    assert planned(data=str(tmp_path / "copy")).data.uri == str(tmp_path / "copy")


DAMAGED = {
    "empty": b"",
    "cut off": b'{"config": {"loop": {"epochs": 3',
    "no text": b"\xff\xfe\x00",
    "null": b"null",
    "list": b"[]",
    "no settings": b'{"manifest_sha256": "abc"}',
    "no data set": b'{"config": {}}',
    "settings are a number": b'{"config": 3, "manifest_sha256": "abc"}',
    "section is a list": b'{"config": {"loop": [1, 2]}, "manifest_sha256": "abc"}',
    "section is null": b'{"config": {"loop": null}, "manifest_sha256": "abc"}',
}


@pytest.mark.parametrize("is_sealed", [True, False])
@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_config_json_is_named(kind, is_sealed, planned, run, tmp_path):
    """Also with the right checksum of its own, which any program can make."""
    run.mkdir(parents=True)
    content = DAMAGED[kind]
    (run / "config.json").write_bytes(to_json(seal(json.loads(content))) if is_sealed and b"}" in content else content)
    before = contents(tmp_path)
    refusal(planned, f"{run}/config.json is damaged", "use another --name")
    assert contents(tmp_path) == before


def test_one_changed_digit_of_config_json_is_said_in_a_sentence(planned, run):
    """Without the file the run goes on by what its checkpoints say; with another setting it would be another run."""
    stored_with(run, planned())
    path = run / "config.json"
    text = path.read_text()
    digits = [at for at, character in enumerate(text) if character.isdigit()]
    assert len(digits) > 100
    said = []
    for at in digits[:: len(digits) // 60]:
        path.write_text(f"{text[:at]}{(int(text[at]) + 5) % 10}{text[at + 1 :]}")
        found = refusal(planned, f"{run}/config.json is damaged (", "use another --name")
        said.append("it does not match its own checksum" in found)
        assert "if the run has a checkpoint, remove that file: checkpoints say the same" in found
    assert sum(said) > len(said) * 0.9  # a few make it no JSON any more
    path.write_text(text)
    assert planned()


@pytest.mark.parametrize("weights", ["a string", ["a", "list"], 3])
def test_config_json_whose_weights_are_no_card_is_named(weights, planned, run):
    plan = planned()
    run.mkdir(parents=True)
    (run / "config.json").write_bytes(to_json(seal({**plan.card, "weights": weights})))
    refusal(planned, f"{run}/config.json is damaged", "use another --name")


def test_config_json_that_cannot_be_read_is_named(planned, run):
    (run / "config.json").mkdir(parents=True)
    refusal(planned, f"{run}/config.json")


def test_batch_smaller_than_the_workers_is_refused(planned, tmp_path):
    assert planned(global_batch_size=6, workers=3).config.loop.global_batch_size == 6
    refusal(lambda: planned(global_batch_size=3, workers=4), "--global-batch-size 3", "each of 4 workers")
    refusal(lambda: planned(global_batch_size=3, workers="1:4"), "each of 4 workers")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("settings", "size", "workers", "micro_batches"),
    [
        ({"global_batch_size": 5, "workers": 3}, 5, 3, 1),
        ({"global_batch_size": 6, "workers": 2, "accumulation_steps": 2}, 6, 2, 2),
        ({"global_batch_size": 64, "workers": 4, "train_images": 7}, 7, 4, 1),
        ({"global_batch_size": 1}, 1, 1, 1),
    ],
)
def test_steps_that_leave_a_worker_a_single_image_at_a_time_are_refused(
    planned, tmp_path, settings, size, workers, micro_batches
):
    """BatchNorm has no variance of one value, and no gradient passes it."""
    words = (
        f"a batch of {size} images on {workers} workers in {micro_batches} accumulation steps",
        "one image at a time",
    )
    refusal(lambda: planned(**settings), *words, "raise --global-batch-size")
    assert contents(tmp_path) == {}


def test_more_train_images_than_there_are_is_refused(planned):
    assert planned(train_images=180).config.data.train_images == 180
    refusal(lambda: planned(train_images=181), "--train-images is 181", "has 200 train images", "20 are held out")


def few_images(folder: Path, counts: list[int], size: Callable[[int], int] = lambda _i: 32) -> str:
    """A data set with so many train images of each class."""

    def items(numbers: list[int]) -> list[sources.Item]:
        labels = [label for label, count in enumerate(numbers) for _ in range(count)]
        return [
            sources.Item(f"{i}.png", label, lambda i=i: np.full((size(i), 32, 3), i, np.uint8))
            for i, label in enumerate(labels)
        ]

    splits = {"train": items(counts), "test": items([1] * len(counts))}
    store.prepare(sources.Source.of("few", [f"class {i}" for i in range(len(counts))], splits), str(folder))
    return str(folder)


def test_data_set_without_an_image_to_validate_on_is_refused(planned, tmp_path):
    uri = few_images(tmp_path / "few", [1, 1, 1])
    before = contents(tmp_path)
    refusal(lambda: planned(data=uri), f"no class of {uri} has the 2 train images")
    assert contents(tmp_path) == before
    enough = few_images(tmp_path / "enough", [1, 2, 1])
    assert planned(data=enough, train_images=3).data.manifest.num_rows("train") == 4
    refusal(lambda: planned(data=enough, train_images=4), "--train-images is 4", "1 are held out")


def test_images_of_several_sizes_cannot_be_kept_decoded(planned, tmp_path):
    uri = few_images(tmp_path / "mixed", [4, 4], lambda i: 20 + i)
    assert planned(data=uri).config.data.cache == "auto"
    refusal(lambda: planned(data=uri, cache="decoded"), "--cache decoded needs images of one size")


def test_data_that_is_not_there_is_named(planned, tmp_path):
    (tmp_path / "file").write_text("no folder")
    refusal(lambda: planned(data=str(tmp_path / "nowhere")), f"{tmp_path}/nowhere is no data set", "jobs/prepare.py")
    refusal(lambda: planned(data=str(tmp_path / "file")), f"{tmp_path}/file")
    assert set(contents(tmp_path)) == {"file"}


def test_storage_that_is_a_file_is_named(planned, tmp_path):
    (tmp_path / "runs").write_text("no folder")
    refusal(planned, f"{tmp_path}/runs/run")


# Start weights.


@pytest.fixture(scope="module")
def base_file(tmp_path_factory) -> Path:
    """A file of weights for the base of resnet50v2, as Keras publishes it."""
    path = tmp_path_factory.mktemp("weights") / "base.h5"
    with h5py.File(path, "w") as file:
        for name, module in base_layers(models.build("resnet50v2", seed=1).base).items():
            for variable, tensor in tensors_of(module).items():
                value = tensor.detach().numpy()
                file[f"{name}/{name}/{variable}:0"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    return path


@pytest.fixture
def with_weights(planned) -> Callable:
    return lambda weights, **more: planned(model="resnet50v2", image_size=96, weights=str(weights), **more)


def test_plan_names_the_weights_by_their_checksum(with_weights, base_file, tmp_path, monkeypatch):
    monkeypatch.chdir(base_file.parent)
    plan = with_weights(base_file.name)
    sha256 = hashlib.sha256(base_file.read_bytes()).hexdigest()
    assert plan.card["weights"] == plan.weights == {"uri": str(base_file), "sha256": sha256, "is_imagenet": False}
    assert plan.config.model.weights == str(base_file)  # workers run in another folder
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("old", "is_given", "refused"),
    [
        ("the same", True, None),
        ("the same", False, "from /elsewhere/base.h5, which --weights that is not given is not"),
        ("others", True, "from /elsewhere/base.h5, which --weights {} is not"),
        ("random", True, "from random weights, which --weights {} is not"),
        ("random", False, None),
    ],
)
def test_run_goes_on_only_from_the_weights_it_was_started_from(old, is_given, refused, with_weights, base_file, run):
    storage = run.parents[1]
    sha256 = {"the same": hashlib.sha256(base_file.read_bytes()).hexdigest(), "others": "0" * 64}.get(old)
    weights = sha256 and {"uri": "/elsewhere/base.h5", "sha256": sha256}
    run.mkdir(parents=True)
    (run / "config.json").write_bytes(to_json(seal({**with_weights("").card, "weights": weights})))
    before, given = contents(storage), base_file if is_given else ""
    if refused:
        refusal(lambda: with_weights(given), refused.format(given), "name the same file, or use another --name")
    else:
        assert (with_weights(given).weights or {}).get("sha256") == sha256
    assert contents(storage) == before


def test_weights_that_are_not_there_or_do_not_fit_are_refused(with_weights, tmp_path):
    (tmp_path / "no.h5").write_bytes(b"no HDF5")
    before = contents(tmp_path)
    refusal(lambda: with_weights(tmp_path / "gone.h5"), f"there is no file {tmp_path}/gone.h5", "jobs/weights.py")
    refusal(lambda: with_weights(tmp_path / "no.h5"), f"{tmp_path}/no.h5")
    assert contents(tmp_path) == before


# What is stored.


@pytest.fixture
def stored(planned, run) -> Callable:
    """Stores a checkpoint of the run, whose config.json is there too."""
    plan = planned()
    stored_with(run, plan)

    def act(epoch: int, step: int = 0, attempt: int = 1, accuracy: float | None = None) -> Checkpoint:
        tensors = {"weight": torch.full((3,), float(epoch))}
        metrics = None if accuracy is None else {"validation_accuracy": accuracy, "validation_loss": 1.0}
        meta = {
            **expected_of(plan.config, plan.data.manifest),
            **{"metrics": metrics, "global_step": 3 * epoch + step, "world_size": 2, "config": plan.config.to_dict()},
        }
        state = CheckpointState(model=tensors, average=None, ranks={}, optimizer={"optimizers": [], "scaler": {}})
        return Checkpoints(str(run)).write(Cursor(epoch, step), attempt, state, meta)

    return act


def damage(run: Path, checkpoint: Checkpoint, file: str = "model.safetensors") -> str:
    """Cuts the file's end off; returns what is to be said of it."""
    path = run / "checkpoints" / checkpoint.name / file
    path.write_bytes(path.read_bytes()[:-1])
    folder = f"{run}/checkpoints/{checkpoint.name}"
    if file == "meta.json":
        path.write_bytes(path.read_bytes()[:20])
        return f"{folder}/meta.json is damaged"
    return f"the checkpoint {folder} is damaged: {file} does not match its checksum; remove that folder"


@pytest.fixture
def explained(planned, tmp_path, shapes_uri) -> Callable:
    """The lines of explain_resume, which must leave all as it is."""

    def act(**values) -> list[str]:
        before, data = contents(tmp_path), contents(Path(shapes_uri))
        lines = explain_resume(planned(**values)).splitlines()
        assert (contents(tmp_path), contents(Path(shapes_uri))) == (before, data)
        return lines

    return act


def test_new_run_would_start_from_the_beginning(explained, run):
    assert explained() == [
        f"run {run}: 0 attempts so far, 3 epochs wanted",
        "would start from the beginning: there is no checkpoint",
    ]


def test_run_that_stored_no_checkpoint_would_start_from_the_beginning(stored, explained, run):
    """It was claimed twice, and cut off within its first checkpoint."""
    for _ in range(2):
        Attempts(Folder(str(run)), "0123456789").claim(takeover=True)
    written = stored(0, 2)
    (run / "checkpoints" / written.name / "meta.json").unlink()
    assert explained() == [
        f"run {run}: 2 attempts so far, 3 epochs wanted",
        "would start from the beginning: there is no checkpoint",
    ]


def test_one_checkpoint_would_be_loaded(stored, explained, planned):
    name = stored(1, 2, attempt=4).name
    assert explained()[1:] == [
        f"  {name}: whole, the newest that can be read",
        f"would load {name}: 1 epochs and 2 steps done, global step 5; written by 2 workers in attempt 4",
    ]
    assert not planned().is_finished


def test_newest_would_be_loaded_and_the_older_ones_are_told(stored, explained):
    best, older, newest = stored(1, accuracy=0.9), stored(2, accuracy=0.5), stored(2, 1)
    assert explained()[1:] == [
        f"  {newest.name}: whole, the newest that can be read",
        f"  {older.name}: older",
        f"  {best.name}: older, kept as the best",
        f"would load {newest.name}: 2 epochs and 1 steps done, global step 7; written by 2 workers in attempt 1",
    ]


def test_later_attempt_is_newer_though_it_has_done_less(stored, explained):
    ahead, newer = stored(2, accuracy=0.5), stored(1, 1, attempt=2)
    lines = explained()
    assert lines[-1].startswith(f"would load {newer.name}: 1 epochs and 1 steps done")
    assert f"  {ahead.name}: older, kept as the best" in lines


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "meta.json"])
def test_damaged_newest_is_passed_over_and_why(file, stored, explained, run):
    older, newest = stored(1, accuracy=0.5), stored(2, accuracy=0.6)
    why = damage(run, newest, file)
    lines = explained()
    assert lines[1].startswith(f"  {newest.name}: PASSED OVER: {why}")
    assert lines[2:] == [
        f"  {older.name}: whole, the newest that can be read",
        f"would load {older.name}: 1 epochs and 0 steps done, global step 3; written by 2 workers in attempt 1",
    ]


def test_checkpoint_of_another_program_is_passed_over(stored, explained, run):
    older, newest = stored(1), stored(2)
    meta = {**newest.meta, "format_version": 99}
    (run / "checkpoints" / newest.name / "meta.json").write_bytes(to_json(seal(meta)))
    lines = explained()
    assert lines[1].startswith(f"  {newest.name}: PASSED OVER: ")
    assert "format version 99" in lines[1]
    assert lines[-1].startswith(f"would load {older.name}")


@pytest.mark.parametrize("file", ["model.safetensors", "meta.json"])
def test_run_of_damaged_checkpoints_only_is_refused(file, stored, explained, run, tmp_path):
    names = [stored(epoch) for epoch in (1, 2)]
    for checkpoint in names:
        damage(run, checkpoint, file)
    before = contents(tmp_path)
    text = refusal(explained, "is damaged", "remove that folder")
    assert any(checkpoint.name in text for checkpoint in names)
    assert contents(tmp_path) == before


def test_checkpoint_of_another_network_is_refused(stored, explained, run):
    """Its config.json is gone, so that only the checkpoint tells."""
    stored(1)
    (run / "config.json").unlink()
    refusal(lambda: explained(model="resnet50v2", image_size=96), "model=fan", "not resnet50v2", "--name")


def test_finished_run_would_do_nothing(stored, explained, planned):
    best, last = stored(2, accuracy=0.9), stored(3, accuracy=0.8)
    assert planned().is_finished
    assert explained()[1:] == [
        f"  {last.name}: whole, the newest that can be read",
        f"  {best.name}: older, kept as the best",
        "would do nothing: the run is finished (3 epochs and 0 steps done, global step 9)",
    ]


def test_finished_run_has_more_to_do_where_more_epochs_are_wanted(stored, explained, planned):
    last = stored(3, accuracy=0.8)
    assert not planned(epochs=4).is_finished
    assert explained(epochs=4)[-1].startswith(f"would load {last.name}: 3 epochs")
    assert planned(epochs=2).is_finished


def test_last_checkpoint_inside_the_last_epoch_is_no_finish(stored, planned):
    stored(2, 2)
    assert not planned().is_finished


def test_finished_run_whose_last_checkpoint_is_damaged_is_not_finished(stored, explained, planned, run):
    older, last = stored(2, accuracy=0.5), stored(3, accuracy=0.6)
    why = damage(run, last)
    assert not planned().is_finished
    assert explained()[1:] == [
        f"  {last.name}: PASSED OVER: {why}",
        f"  {older.name}: whole, the newest that can be read",
        f"would load {older.name}: 2 epochs and 0 steps done, global step 6; written by 2 workers in attempt 1",
    ]
    damage(run, older)
    refusal(planned, "no checkpoint of the run can be read")


# A folder that is no run.


@pytest.mark.parametrize("name", ["notes.txt", "ray", "src/main.py"])
def test_a_folder_with_other_files_is_no_run(name, tmp_path):
    file = tmp_path / "runs" / "run" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"somebody's own")
    with pytest.raises(UserError, match=r"is no run: it has no config\.json and no checkpoint") as error:
        check_stored({}, Run(str(tmp_path / "runs" / "run")), "")
    assert name.split("/")[0] in str(error.value)
    assert file.read_bytes() == b"somebody's own"


@pytest.mark.parametrize("name", ["attempts", "preflight", "checkpoints"])
def test_a_run_that_ended_before_its_card_was_stored_goes_on(name, tmp_path):
    (tmp_path / "runs" / "run" / name).mkdir(parents=True)
    check_stored({}, Run(str(tmp_path / "runs" / "run")), "")
