"""Checkpoints: what is written comes back, what is damaged or foreign is refused by its path, the right ones stay.

Where the newest is damaged a run goes on from the one before, and says so.
"""

import hashlib
import importlib.metadata
import json
import math
import pickle
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import EXPECT, meta_of, put_meta, same, state, tree, weights, write

from cifar_dist.errors import UserError
from cifar_dist.models.spec import MODELS
from cifar_dist.run.checkpoint import FORMAT_VERSION, Checkpoint, Cursor, Damaged
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.sealed_json import seal

FILES = ["model.safetensors", "average.safetensors", "ranks.safetensors", "optimizer.pt"]


@pytest.fixture
def run(tmp_path) -> Checkpoints:
    return Checkpoints(str(tmp_path / "run"))


def path_of(run: Checkpoints, checkpoint: Checkpoint, file: str) -> Path:
    return Path(run.folder.path) / checkpoint.name / file


def names(checkpoints: list[Checkpoint]) -> list[str]:
    return [c.name for c in checkpoints]


class Notes(list):
    """What load_newest said of each checkpoint."""

    def __call__(self, name: str, fault: str) -> None:
        self.append((name, fault))


# Round trip.


@pytest.mark.parametrize("average", [None, weights(0.5)])
@pytest.mark.parametrize("ranks", [{}, {"model": torch.ones(2, 4)}])
def test_what_is_written_comes_back(run, average, ranks):
    whole = replace(state(2), average=average, ranks=ranks)
    written = run.write(Cursor(2, 7), 3, whole, meta_of((0.5, 1.0)))
    found = Checkpoints(run.folder.uri.removesuffix("/checkpoints")).latest()
    assert found == written
    assert (found.name, found.cursor) == ("epoch-0002-step-000007-attempt-0003", Cursor(2, 7))
    assert (found.meta["attempt"], found.meta["model"]) == (3, "fan")
    loaded = run.load(found, EXPECT)
    assert same(loaded, whole)
    assert all(tensor.device.type == "cpu" for tensor in loaded.model.values())


def test_a_checkpoint_says_which_version_of_the_network_it_is_of(run):
    versions = {name: spec.version for name, spec in MODELS.items()}
    for cursor, (model, number) in enumerate(versions.items()):
        meta = run.write(Cursor(cursor, 1), 1, state(1), {**meta_of(), "model": model}).meta
        assert meta["model_version"] == number
    assert versions == {"fan": 1, "resnet50v2": 2}  # raise one when a network computes something else


@pytest.mark.parametrize("made", [None, 1, 3])
def test_weights_of_another_version_of_the_network_are_refused(run, made):
    """Those without a number are of version 1: that head had no ReLU, the same tensors would fit."""
    written = run.write(Cursor(2, 0), 1, state(1), {**meta_of((0.5, 1.0)), "model": "resnet50v2"})
    meta = {key: value for key, value in written.meta.items() if key != "model_version"}
    put_meta(path_of(run, written, "meta.json"), meta | ({"model_version": made} if made else {}))
    sentence = rf"holds version {made or 1} of the network resnet50v2, .* version 2, with a ReLU .* another --name"
    (found,) = run.all()
    for read in (lambda: run.load(found), lambda: run.load_newest({"model": "resnet50v2"})):
        with pytest.raises(UserError, match=sentence):
            read()
    put_meta(path_of(run, written, "meta.json"), written.meta)
    assert same(run.load(run.all()[0]), state(1))


def test_a_state_without_a_log_has_none_when_it_is_loaded(run):
    written = run.write(Cursor(0, 1), 1, replace(state(1), log=None), meta_of())
    assert written.meta["log"] is None
    assert run.load(written).log is None


def test_meta_names_the_checksum_of_every_file_and_the_versions(run):
    written = write(run, 1)
    assert {p.name for p in path_of(run, written, "").iterdir()} == {*FILES, "meta.json"}
    meta = json.loads(path_of(run, written, "meta.json").read_text())
    assert meta["files"].keys() == set(FILES)
    for name in FILES:
        assert meta["files"][name] == hashlib.sha256(path_of(run, written, name).read_bytes()).hexdigest()
    assert meta["packages"]["torch"] == importlib.metadata.version("torch")


def test_evaluation_does_not_read_the_optimizer(run):
    written = write(run, 1)
    path_of(run, written, "optimizer.pt").unlink()
    assert same(run.load(written, optimizer=False), replace(state(1), optimizer={}))


def test_a_run_without_checkpoints_has_none(run):
    assert (run.all(), run.latest(), run.best(), run.scan()) == ([], None, None, ([], {}))
    assert run.load_newest(EXPECT) is None


def test_writing_a_cursor_again_replaces_it(run):
    write(run, 1)
    again = run.write(Cursor(1, 0), 1, state(9), meta_of())
    assert run.all() == [again]
    assert same(run.load(again), state(9))


def test_a_checkpoint_that_is_being_replaced_is_none_until_it_is_whole(run):
    """Its old meta.json would vouch for files that are no longer those it names."""
    write(run, 1)
    seen = []
    run.write(Cursor(1, 0), 1, state(9), meta_of(), lambda: seen.append(len(run.all())))
    assert seen == [1, 0]
    assert len(run.all()) == 1


# Which ones.


def test_latest_goes_by_cursor(run):
    for epoch, step in ((9, 0), (10, 5), (10, 0)):
        write(run, epoch, step)
    assert run.latest().cursor == Cursor(10, 5)


def test_a_later_attempt_is_newer_than_an_earlier_one_that_had_got_further(run):
    """It went on from what was whole when it started; what lies beyond that has been given up."""
    write(run, 9, 5, attempt=2)
    write(run, 4, 0, attempt=10)
    write(run, 3, 0, attempt=10)
    write(run, 8, 0, attempt=9)
    assert [(c.meta["attempt"], c.cursor.epoch) for c in run.all()] == [(2, 9), (9, 8), (10, 3), (10, 4)]
    assert run.latest().cursor == Cursor(4, 0)
    checkpoint, loaded = run.load_newest(EXPECT)
    assert checkpoint == run.latest()
    assert same(loaded, state(4))


def test_attempts_do_not_overwrite_each_others_checkpoints(run):
    first = run.write(Cursor(1, 0), 1, state(5), meta_of())
    second = run.write(Cursor(1, 0), 2, state(6), meta_of())
    assert run.all() == [first, second]
    assert same(run.load(first), state(5))
    assert same(run.load(second), state(6))


def test_best_goes_by_validation_accuracy_then_loss_then_cursor(run):
    for epoch, score in enumerate([(0.5, 1.0), (0.6, 2.0), (0.6, 1.5), (0.6, 1.5), (0.4, 0.1)], 1):
        write(run, epoch, 0, score)
    write(run, 5, 3)  # inside an epoch: not validated
    assert run.best().cursor == Cursor(4, 0)


def test_best_is_the_latest_where_none_was_validated(run):
    write(run, 0, 3)
    write(run, 0, 6)
    assert run.best().cursor == Cursor(0, 6)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("score", [(NAN, 1.0), (0.9, NAN), (0.9, INF), (NAN, NAN), (INF, 0.1), (0.9, -INF)])
@pytest.mark.parametrize("others", [[(0.5, 1.0), (0.4, 1.0)], [None, (0.0, 9.0)], [None, None]])
def test_what_was_not_finite_is_stored_as_null_and_never_the_best(run, score, others):
    """Also where its accuracy is the highest, or no other one was validated."""
    first, odd, last = (write(run, epoch, 0, made) for epoch, made in enumerate([others[0], score, others[1]], 1))
    stored = json.loads(path_of(run, odd, "meta.json").read_text())["metrics"]
    assert list(stored.values()) == [value if math.isfinite(value) else None for value in score]
    assert names(run.all()) == names([first, odd, last])
    assert run.best() == (first if others[0] else last)
    assert same(run.load(odd), state(2))
    run.keep(1, 1)
    assert names(run.all()) == names(
        sorted({run.best().name: run.best(), last.name: last}.values(), key=lambda c: c.age)
    )


@pytest.mark.parametrize(("num_newest", "kept"), [(1, [2, 5]), (2, [2, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_keep_leaves_the_newest_and_the_best(run, num_newest, kept):
    for epoch, accuracy in enumerate([0.1, 0.9, 0.2, 0.3, 0.4], 1):
        write(run, epoch, 0, (accuracy, 1.0))
    run.keep(num_newest, 1)
    assert [c.cursor.epoch for c in run.all()] == kept
    assert run.folder.names() == [f"epoch-{epoch:04d}-step-000000-attempt-0001" for epoch in kept]
    for checkpoint in run.all():
        run.load(checkpoint)


def test_keep_cleans_up_after_earlier_attempts(run):
    write(run, 8, attempt=1)
    cut_off(run, "epoch-0009-step-000000-attempt-0001")
    newer = [write(run, epoch, attempt=2) for epoch in (5, 6)]
    run.keep(2, 2)
    assert run.folder.names() == names(newer)


def cut_off(run: Checkpoints, name: str) -> Path:
    """A checkpoint that has no meta.json yet: it is being written, or its writer was killed."""
    folder = Path(run.folder.path) / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    return folder


def test_keep_of_an_older_attempt_leaves_what_a_newer_one_has_or_is_writing(run):
    """The older one may be in the midst of its clean-up when the run is taken over."""
    write(run, 6, attempt=1)
    write(run, 7, attempt=1)
    cut_off(run, "epoch-0008-step-000000-attempt-0001")
    newer = [write(run, epoch, attempt=2) for epoch in (1, 2, 3)]
    writing = cut_off(run, "epoch-0004-step-000000-attempt-0002")
    before = {c.name: tree(path_of(run, c, "")) for c in newer}
    run.keep(1, 1)
    assert run.folder.names() == [*names(newer), writing.name]
    assert {c.name: tree(path_of(run, c, "")) for c in newer} == before
    assert tree(writing) == {"model.safetensors": b"half"}


def test_folder_without_meta_is_no_checkpoint_and_goes(run):
    written = write(run, 1)
    beside = cut_off(run, "epoch-0002-step-000000-attempt-0001").parent
    (beside / ".nfs0001").write_text("left behind by a file server")
    notes = Notes()
    assert run.all() == [written]
    assert run.load_newest(EXPECT, notes)[0] == run.latest() == written
    assert notes == [(written.name, "")]  # nothing is wrong: a write was cut off
    run.keep(1, 1)
    assert run.folder.names() == [".nfs0001", written.name]


# Writing.


def test_write_that_fails_leaves_the_one_before(run):
    """The optimizer's state cannot be pickled: the weights were written by then."""
    written = write(run, 1)
    with pytest.raises(Exception, match="pickle"):
        run.write(Cursor(2, 0), 1, replace(state(2), optimizer={"optimizer": lambda: 0}), meta_of())
    assert (Path(run.folder.path) / "epoch-0002-step-000000-attempt-0001" / "model.safetensors").exists()
    assert run.latest() == written
    run.load(written)


@pytest.mark.parametrize("large", ["model", "average", "ranks", "optimizer"])
def test_write_that_finds_no_room_says_so_and_frees_what_it_took(run, large):
    """A limit on the size of files, which fails as a full disk does, in the midst of each kind of file."""
    written = write(run, 1)
    before = tree(Path(run.folder.path))
    tensors = {"large": torch.zeros(100_000)}
    whole = replace(state(2), **{large: {"optimizers": [tensors], "scaler": {}} if large == "optimizer" else tensors})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, old[1]))
        with pytest.raises(UserError, match=r"cannot write .*/epoch-0002-.*make room") as error:
            run.write(Cursor(2, 0), 1, whole, meta_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value)
    assert tree(Path(run.folder.path)) == before
    assert run.folder.names() == [written.name]
    again = run.write(Cursor(2, 0), 1, whole, meta_of())
    assert same(run.load(again), whole)


def fence_that_refuses(call: int, seen: Callable[[], Any] = lambda: None) -> Callable[[], None]:
    """Raises from its `call`-th call on; looks at `seen` at every call."""
    calls = []

    def fence() -> None:
        calls.append(seen())
        if len(calls) >= call:
            raise UserError("taken over")

    fence.calls = calls  # type: ignore[attr-defined]
    return fence


def test_fence_is_asked_before_anything_is_written_and_again_before_meta(run):
    write(run, 1)
    here = Path(run.folder.path)
    fence = fence_that_refuses(9, lambda: sorted(tree(here)))
    written = run.write(Cursor(2, 0), 1, state(2), meta_of(), fence)
    first = [f"epoch-0001-step-000000-attempt-0001/{file}" for file in sorted([*FILES, "meta.json"])]
    assert fence.calls == [first, [*first, *(f"{written.name}/{file}" for file in sorted(FILES))]]


def test_fence_that_refuses_at_once_leaves_everything_as_it_was(run):
    """Also the checkpoint that has the name already."""
    written = write(run, 1)
    before = tree(Path(run.folder.path))
    for epoch in (1, 2):
        with pytest.raises(UserError, match="taken over"):
            run.write(Cursor(epoch, 0), 1, state(9), meta_of(), fence_that_refuses(1))
    assert tree(Path(run.folder.path)) == before
    assert run.folder.names() == [written.name]


def test_fence_that_refuses_before_meta_leaves_no_checkpoint(run):
    written = write(run, 1)
    with pytest.raises(UserError, match="taken over"):
        run.write(Cursor(2, 0), 1, state(2), meta_of(), fence_that_refuses(2))
    notes = Notes()
    assert run.all() == [written]
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert (checkpoint, notes) == (written, [(written.name, "")])
    assert same(loaded, state(1))


# Damaged and foreign.


def assert_refused(run: Checkpoints, checkpoint: Checkpoint, *words: str, **expect: Any) -> UserError:
    with pytest.raises(UserError) as error:
        run.load(checkpoint, expect)
    text = str(error.value)
    assert run.where(checkpoint.name) in text
    assert "\n" not in text
    for word in words:
        assert word in text
    return error.value


DAMAGES = ["truncated", "emptied", "one bit", "one bit more", "removed"]


def damage_file(path: Path, damage: str) -> str:
    """What loading must say of it."""
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
        return f"it lacks {path.name}"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damaged = {"truncated": content[:-1], "emptied": b"", "one bit": flipped, "one bit more": content + b"\0"}
    path.write_bytes(damaged[damage])
    return f"{path.name} does not match its checksum"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused(run, file, damage):
    written = write(run, 1)
    fault = damage_file(path_of(run, written, file), damage)
    assert isinstance(assert_refused(run, written, fault), Damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_damaged_meta_is_refused(run, content):
    written = write(run, 1)
    path_of(run, written, "meta.json").write_text(content)
    with pytest.raises(Damaged, match=r"meta\.json is damaged") as error:
        run.all()
    assert run.where(written.name) in str(error.value)


def test_other_format_version_is_refused(run):
    written = write(run, 1)
    put_meta(path_of(run, written, "meta.json"), {**written.meta, "format_version": 1})
    with pytest.raises(Damaged, match=f"has format version 1, this program reads {FORMAT_VERSION}"):
        run.all()


def test_another_model_or_data_set_is_refused(run):
    written = write(run, 1)
    assert_refused(run, written, "'fan'", "'resnet50v2'", model="resnet50v2")
    assert_refused(run, written, "manifest_sha256", "'abc'", "'def'", model="fan", manifest_sha256="def")
    assert_refused(run, written, "num_classes", num_classes=100)
    assert_refused(run, written, "image_size", "None", "32", image_size=32)  # a checkpoint that does not say


# Falling back.


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_run_goes_on_from_the_one_before_a_damaged_file(run, file, damage):
    before, newest = write(run, 1), write(run, 2)
    fault = damage_file(path_of(run, newest, file), damage)
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert checkpoint == before
    assert same(loaded, state(1))
    (passed_over, said), loading = notes
    assert (passed_over, loading) == (newest.name, (before.name, ""))
    assert run.where(newest.name) in said
    assert fault in said


def sealed(meta: dict[str, Any]) -> str:
    return json.dumps(seal(meta))


METAS: dict[str, Callable[[dict[str, Any]], str]] = {
    "emptied": lambda _: "",
    "cut": lambda meta: json.dumps(meta)[:-1],
    "no JSON": lambda meta: json.dumps(meta).replace(":", ";"),
    "not text": lambda meta: json.dumps(meta).replace("fan", "\udcff\udcfe"),
    "another kind": lambda meta: json.dumps([meta]),
    "no cursor": lambda meta: sealed({k: v for k, v in meta.items() if k != "epoch"}),
    "no attempt": lambda meta: sealed({k: v for k, v in meta.items() if k != "attempt"}),
    "no metrics": lambda meta: sealed({k: v for k, v in meta.items() if k != "metrics"}),
    "half the metrics": lambda meta: sealed({**meta, "metrics": {"validation_accuracy": 0.5}}),
    "no weights": lambda meta: sealed({**meta, "files": {**meta["files"], "model.safetensors": None}}),
    "no files": lambda meta: sealed({**meta, "files": {}}),
    "an earlier format": lambda meta: sealed({**meta, "format_version": FORMAT_VERSION - 1}),
    "a later format": lambda meta: sealed({**meta, "format_version": FORMAT_VERSION + 1}),
    "no checksum": lambda meta: json.dumps({k: v for k, v in meta.items() if k != "sha256"}),
    "an empty checksum": lambda meta: json.dumps({**meta, "sha256": ""}),
    "a setting more": lambda meta: json.dumps({**meta, "more": 1}),
}


@pytest.mark.parametrize("damage", METAS)
def test_run_goes_on_from_the_one_before_a_damaged_meta(run, damage):
    before, newest = write(run, 1), write(run, 2)
    path = path_of(run, newest, "meta.json")
    path.write_bytes(METAS[damage](newest.meta).encode(errors="surrogateescape"))
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert checkpoint == before
    assert same(loaded, state(1))
    (passed_over, said), loading = notes
    assert (passed_over, loading) == (newest.name, (before.name, ""))
    assert run.where(newest.name) in said


def test_one_changed_digit_of_meta_makes_its_checkpoint_none(run):
    """It is passed over, and is not the best one, for which the real best one would be deleted."""
    best, older, newest = (write(run, n, 0, (accuracy, 1.0)) for n, accuracy in enumerate([0.912, 0.412, 0.433], 1))
    path = path_of(run, newest, "meta.json")
    text = path.read_text()
    digits = [at for at, character in enumerate(text) if character.isdigit()]
    assert len(digits) > 100
    for at in digits:
        path.write_text(f"{text[:at]}{(int(text[at]) + 5) % 10}{text[at + 1 :]}")
        found, damaged = run.scan()
        assert (found, list(damaged)) == ([best, older], [newest.name]), text[at - 40 : at + 10]
        assert run.best() == best
        run.keep(1, 1)
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert (checkpoint, [name for name, _ in notes]) == (older, [newest.name, older.name])
    assert same(loaded, state(2))
    assert run.folder.names() == names([best, older, newest])  # a damaged one is left to whoever can mend it
    path.write_text(text)
    assert run.load_newest(EXPECT)[0] == newest


def test_a_run_whose_only_meta_has_a_changed_digit_does_not_start_again(run):
    written = write(run, 1, 0, (0.5, 1.0))
    path = path_of(run, written, "meta.json")
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
    for read in (run.all, run.best, run.latest, lambda: run.load_newest(EXPECT)):
        with pytest.raises(Damaged, match=r"meta\.json does not match its own checksum; remove that folder") as error:
            read()
        assert run.where(written.name) in str(error.value)
        assert "\n" not in str(error.value)


def test_each_checkpoint_that_was_passed_over_is_told(run):
    oldest, *later = [write(run, epoch) for epoch in (1, 2, 3, 4)]
    faults = [damage_file(path_of(run, c, file), "removed") for c, file in zip(later, FILES, strict=False)]
    notes = Notes()
    assert run.load_newest(EXPECT, notes)[0] == oldest
    assert [name for name, _ in notes] == names([*reversed(later), oldest])
    for (_, said), fault in zip(notes, [*reversed(faults), ""], strict=True):
        assert fault in said


def test_older_damage_does_not_matter_to_a_whole_newest_one(run):
    damage_file(path_of(run, write(run, 1), "model.safetensors"), "truncated")
    path_of(run, write(run, 2), "meta.json").write_text("{")
    newest = write(run, 3)
    checkpoint, loaded = run.load_newest(EXPECT)
    assert checkpoint == newest
    assert same(loaded, state(3))


def test_what_is_written_after_a_fall_back_is_the_newest_from_then_on(run):
    write(run, 1)
    damaged = write(run, 5)
    damage_file(path_of(run, damaged, "optimizer.pt"), "one bit")
    again = run.write(Cursor(2, 0), 2, state(7), meta_of())
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert (checkpoint, notes) == (again, [(again.name, "")])
    assert same(loaded, state(7))
    run.keep(1, 2)
    assert run.folder.names() == [again.name]


@pytest.mark.parametrize("kinds", [["file"], ["meta"], ["file", "meta"], ["meta", "file"], ["file", "version", "file"]])
def test_run_whose_checkpoints_are_all_damaged_does_not_start_again(run, kinds):
    """None would mean: no checkpoint yet, train from the start. A checkpoint that was cut off does not count."""
    for epoch, kind in enumerate(kinds, 1):
        written = write(run, epoch)
        if kind == "file":
            damage_file(path_of(run, written, FILES[epoch - 1]), "truncated")
        elif kind == "meta":
            path_of(run, written, "meta.json").write_text("{")
        else:
            put_meta(path_of(run, written, "meta.json"), {**written.meta, "format_version": 9})
    cut_off(run, "epoch-0009-step-000000-attempt-0001")
    notes = Notes()
    with pytest.raises(Damaged, match=r"no checkpoint of the run can be read: .*--name") as error:
        run.load_newest(EXPECT, notes)
    assert "\n" not in str(error.value)
    assert len(notes) == len(kinds)
    assert all(fault for _, fault in notes)


@pytest.mark.parametrize("key", EXPECT)
def test_checkpoint_of_another_model_or_data_set_is_not_fallen_back_from(run, key):
    """The run is another one: training on from whatever fits would hide that."""
    write(run, 1)
    foreign = write(run, 2, **{key: "another"})
    notes = Notes()
    with pytest.raises(UserError, match=f"made with {key} 'another', this run has") as error:
        run.load_newest(EXPECT, notes)
    assert type(error.value) is UserError
    assert run.where(foreign.name) in str(error.value)
    assert notes == []


def test_foreign_checkpoint_behind_a_damaged_one_is_refused_too(run):
    write(run, 1, model="resnet50v2")
    damage_file(path_of(run, write(run, 2), "model.safetensors"), "one bit")
    with pytest.raises(UserError, match="made with model 'resnet50v2', this run has 'fan'") as error:
        run.load_newest(EXPECT)
    assert type(error.value) is UserError


def test_meta_with_files_of_another_kind_is_damaged(run):
    before, newest = write(run, 1), write(run, 2)
    put_meta(path_of(run, newest, "meta.json"), {**newest.meta, "files": list(newest.meta["files"])})
    assert run.load_newest(EXPECT)[0] == before


@pytest.mark.parametrize("key", ["epoch", "step", "attempt"])
def test_meta_that_contradicts_the_folders_name_is_damaged(run, key):
    """Its own checksum is right; the weights would go on at another place of the data stream, unnoticed."""
    before, newest = write(run, 1), write(run, 2, 6)
    put_meta(path_of(run, newest, "meta.json"), {**newest.meta, key: newest.meta[key] + 1})
    assert run.load_newest(EXPECT)[0] == before


def test_run_of_the_format_before_does_not_start_again(run):
    written = write(run, 2)
    folder = path_of(run, written, "")
    old = folder.rename(folder.with_name("epoch-0002-step-000000"))
    put_meta(old / "meta.json", {**written.meta, "format_version": 2})
    with pytest.raises(Damaged, match="format version 2"):
        run.load_newest(EXPECT)


def test_keep_leaves_the_checkpoints_of_another_format(run):
    """load_newest says to use the program that wrote them; that has to find them."""
    write(run, 1)
    later = write(run, 2)
    put_meta(path_of(run, later, "meta.json"), {**later.meta, "format_version": FORMAT_VERSION + 1})
    newest = write(run, 2, attempt=2)
    run.keep(1, 2)
    assert run.folder.names() == names([later, newest])


# Malicious.


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
    put_meta(path_of(run, checkpoint, "meta.json"), checkpoint.meta)
    return next(c for c in run.all() if c.name == checkpoint.name)


def malicious_files(trace: Path, folder: Path) -> list[bytes]:
    torch.save({"optimizer": Malicious(trace)}, folder / "zipped.pt")
    return [pickle.dumps(Malicious(trace)), (folder / "zipped.pt").read_bytes()]


def place(run: Checkpoints, checkpoint: Checkpoint, content: bytes, forged: bool) -> Checkpoint:
    if forged:
        return forge(run, checkpoint, "optimizer.pt", content)
    path_of(run, checkpoint, "optimizer.pt").write_bytes(content)
    return checkpoint


@pytest.mark.parametrize("kind", [0, 1])
def test_the_malicious_files_do_what_they_are_meant_to(tmp_path, kind):
    """Else the tests below would prove nothing."""
    (tmp_path / "file").write_bytes(malicious_files(tmp_path / "trace", tmp_path)[kind])
    if kind == 0:
        pickle.loads((tmp_path / "file").read_bytes())  # noqa: S301
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("forged", [False, True])
def test_malicious_pickle_is_never_executed(run, tmp_path, forged, kind):
    trace = tmp_path / "trace"
    written = place(run, write(run, 1), malicious_files(trace, tmp_path)[kind], forged)
    assert_refused(run, written, "optimizer.pt")
    assert not trace.exists()


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("forged", [False, True])
def test_malicious_pickle_is_not_executed_when_it_is_passed_over(run, tmp_path, forged, kind):
    trace = tmp_path / "trace"
    content = malicious_files(trace, tmp_path)[kind]
    oldest, middle, newest = (write(run, epoch) for epoch in (1, 2, 3))
    for checkpoint in (middle, newest):
        place(run, checkpoint, content, forged)
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert checkpoint == oldest
    assert same(loaded, state(1))
    assert [(name, "optimizer.pt" in fault) for name, fault in notes[:2]] == [(newest.name, True), (middle.name, True)]
    place(run, oldest, content, forged)
    with pytest.raises(Damaged):
        run.load_newest(EXPECT)
    assert not trace.exists()


def test_stray_pickles_beside_a_checkpoint_are_not_read(run, tmp_path):
    written = write(run, 1)
    for name in ("extra.pt", "model.pt", "data.pkl"):
        path_of(run, written, name).write_bytes(malicious_files(tmp_path / "trace", tmp_path)[0])
    assert same(run.load(written), state(1))
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file in FILES for content in (b"", b"of no kind at all", b"\xff" * 64)]
)
def test_file_of_another_kind_is_refused_even_with_the_right_checksum(run, file, content):
    before = write(run, 1)
    forged = forge(run, write(run, 2), file, content)
    assert isinstance(assert_refused(run, forged, file), Damaged)
    assert run.load_newest(EXPECT)[0] == before


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("where the run should be")
    run = Checkpoints(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot \w+ .*file/checkpoints"):
        write(run, 1)


# Object storage.


def test_round_trip_on_s3(s3_uri):
    run = Checkpoints(s3_uri)
    assert run.latest() is None
    for epoch, accuracy in ((1, 0.9), (2, 0.1), (3, 0.2)):
        write(run, epoch, 0, (accuracy, 1.0))
    run.keep(1, 1)
    assert [c.cursor.epoch for c in run.all()] == [1, 3]
    assert same(Checkpoints(s3_uri).load(run.best(), {"model": "fan"}), state(1))
    newest = run.latest()
    with run.folder.fs.open_output_stream(run.folder.at(f"{newest.name}/model.safetensors")) as stream:
        stream.write(b"something else")
    assert_refused(run, newest, "model.safetensors")
    notes = Notes()
    checkpoint, loaded = run.load_newest(EXPECT, notes)
    assert checkpoint.cursor == Cursor(1, 0)
    assert same(loaded, state(1))
    assert [name for name, _ in notes] == [newest.name, checkpoint.name]


def test_what_was_cut_off_on_s3_is_no_checkpoint_and_goes(s3_uri):
    run = Checkpoints(s3_uri)
    written = write(run, 1)
    with pytest.raises(UserError, match="taken over"):
        run.write(Cursor(2, 0), 1, state(2), meta_of(), fence_that_refuses(2))
    assert run.folder.names("epoch-0002-step-000000-attempt-0001") == sorted(FILES)
    assert run.load_newest(EXPECT)[0] == written
    run.keep(1, 1)
    assert run.folder.names() == [written.name]
