"""A run's record: a resume goes on after a checkpoint's lines, nothing else is lost, TensorBoard reads it; warnings."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from cifar_dist.errors import UserError
from cifar_dist.storage import Folder
from cifar_dist.train import metrics
from cifar_dist.train.metrics import RunLog, chance_warning, read_lines, validation_lags, validation_warning


def filled(run: Path, first: int, last: int, lines: list[dict[str, Any]] | None = None) -> RunLog:
    """Steps `first` to `last` of a run that goes on after `lines`."""
    log = RunLog(str(run), first - 1, lines or [])
    for step in range(first, last + 1):
        log.add("step", step // 5, step, train_loss=1 / step, train_accuracy=step / 100)
    log.store(log.take())
    return log


def steps(run: Path) -> list[int]:
    return [line["global_step"] for line in read_lines(Folder(str(run)))]


def test_a_new_run_has_no_lines(tmp_path):
    assert read_lines(Folder(str(tmp_path))) == []
    assert RunLog(str(tmp_path), 0, []).lines == []


def test_lines_say_what_was_measured_where(tmp_path):
    log = RunLog(str(tmp_path), 0, [])
    log.add("step", 0, 20, train_loss=2.5, step=20)
    log.add("warning", 0, 20, warning="kind", message="a sentence")
    log.store(log.take())
    expected = [
        {"kind": "step", "epoch": 0, "global_step": 20, "train_loss": 2.5, "step": 20},
        {"kind": "warning", "epoch": 0, "global_step": 20, "warning": "kind", "message": "a sentence"},
    ]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected
    assert read_lines(Folder(str(tmp_path))) == expected


def test_nothing_is_stored_before_store(tmp_path):
    log = RunLog(str(tmp_path), 0, [])
    log.add("step", 0, 1, train_loss=1.0)
    lines = log.take()
    assert list(tmp_path.iterdir()) == []
    log.store(lines)
    log.store(lines)
    assert steps(tmp_path) == [1]


def test_what_was_taken_does_not_grow(tmp_path):
    """It belongs to a checkpoint, and is stored while training goes on: a line beyond it would come twice."""
    log = filled(tmp_path, 1, 2)
    taken = log.take()
    log.add("step", 0, 3, train_loss=1.0)
    assert [line["global_step"] for line in taken] == [1, 2]
    log.store(taken)
    assert steps(tmp_path) == [1, 2]
    assert [line["global_step"] for line in log.take()] == [1, 2, 3]


def test_resume_drops_later_lines_and_goes_on(tmp_path):
    """`lines` are those of the checkpoint, whatever is stored in the run's own file."""
    first = filled(tmp_path, 1, 8).lines
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    second = filled(tmp_path, 6, 9, first[:5]).lines  # the checkpoint was of step 5
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert second[:5] == first[:5]
    filled(tmp_path, 4, 4, second[:3])
    assert steps(tmp_path) == [1, 2, 3, 4]
    (tmp_path / "metrics.jsonl").unlink()
    filled(tmp_path, 3, 3, second[:2])
    assert steps(tmp_path) == [1, 2, 3]


def test_a_resume_leaves_the_lines_that_it_was_given_alone(tmp_path):
    given = filled(tmp_path, 1, 2).take()
    filled(tmp_path, 3, 4, given)
    assert [line["global_step"] for line in given] == [1, 2]


def test_opening_a_log_changes_nothing_stored(tmp_path):
    log = filled(tmp_path, 1, 3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    RunLog(str(tmp_path), 0, [])
    RunLog(str(tmp_path), 3, log.lines)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_damaged_lines_are_named(tmp_path):
    filled(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged") as error:
        read_lines(Folder(str(tmp_path)))
    assert str(path) in str(error.value)


def test_a_log_is_due_when_it_was_not_taken_for_a_while(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    log = RunLog(str(tmp_path), 0, [])
    assert not log.is_due
    now += metrics.FLUSH_SECONDS + 1
    assert log.is_due
    log.take()
    assert not log.is_due


def test_record_in_a_bucket(s3_uri):
    run = Folder(s3_uri)
    assert read_lines(run) == []
    log = RunLog(s3_uri, 0, [])
    for step in (1, 2):
        log.add("step", 0, step, train_loss=1 / step)
        log.store(log.take())
    assert [line["global_step"] for line in read_lines(run)] == [1, 2]
    (name,) = run.names("tensorboard")
    found = [v.simple_value for e in parsed(run.read(f"tensorboard/{name}")) for v in e.summary.value]
    assert found == [1.0, 0.5]


# TensorBoard.


def events(file: Path) -> list[Event]:
    return parsed(file.read_bytes())


def parsed(content: bytes) -> list[Event]:
    """A TFRecord file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 16 + length
    return found


def test_tensorboard_events_can_be_read_back(tmp_path):
    filled(tmp_path, 1, 3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    found = {(v.tag, e.step): v.simple_value for e in events(file) for v in e.summary.value}
    expected = {("step/train_loss", s): 1 / s for s in (1, 2, 3)}
    expected |= {("step/train_accuracy", s): s / 100 for s in (1, 2, 3)}
    assert found == pytest.approx(expected)


def test_tensorboard_is_told_to_drop_what_a_resume_repeats(tmp_path):
    log = filled(tmp_path, 1, 3)
    first = set((tmp_path / "tensorboard").iterdir())
    filled(tmp_path, 3, 4, log.lines[:2])
    (file,) = set((tmp_path / "tensorboard").iterdir()) - first  # the earlier attempt's file is kept
    starts = [e.step for e in events(file) if e.HasField("session_log")]
    assert starts == [3]


# Accuracy at chance.


def test_training_at_chance_says_what_to_look_at():
    message = chance_warning(0.11, 1000, 10)
    assert "training accuracy is 11.0%, chance is 10.0%" in message
    assert "learning rate" in message


@pytest.mark.parametrize(
    ("accuracy", "num_seen", "num_classes", "warned"),
    [
        *((0.5, 1000, 10, False), (0.5, 1000, 2, True)),
        # At 1000 images the standard error is sqrt(0.1 * 0.9 / 1000) = 0.0095, so the limit is 0.1285.
        *((0.128, 1000, 10, True), (0.129, 1000, 10, False)),
        *((0.12, 100, 10, True), (0.12, 10_000, 10, False)),  # more images make the warning stricter
        *((1.0, 8, 2, False), (0.9, 10, 2, False)),  # too few images to tell
    ],
)
def test_chance_is_within_three_standard_errors(accuracy, num_seen, num_classes, warned):
    assert (chance_warning(accuracy, num_seen, num_classes) is not None) is warned


# Validation that lags behind training.


@pytest.mark.parametrize(
    ("train", "validation", "num_classes", "lags"),
    [
        (0.51, 0.155, 10, True),  # the deck's
        *((0.51, 0.23, 10, True), (0.51, 0.24, 10, False)),  # a third of the gain of 0.41 is 0.137
        *((0.19, 0.1, 10, False), (0.21, 0.1, 10, True)),  # training must be at twice chance
        *((0.74, 0.5, 2, False), (0.76, 0.5, 2, True)),  # or halfway from chance to all
        *((0.98, 0.78, 10, False), (0.1, 0.1, 10, False), (0.3, 0.05, 10, True)),
    ],
)
def test_validation_lags_where_it_has_less_than_a_third_of_the_gain(train, validation, num_classes, lags):
    assert validation_lags(train, validation, num_classes) is lags


@pytest.mark.parametrize(("recalibrated", "batchnorm"), [(0.51, True), (0.28, True), (0.27, False), (0.16, False)])
def test_validation_warning_tells_batchnorm_from_other_causes(recalibrated, batchnorm):
    """The deck's case: 51% in training, 15.5% in validation, momentum 0.99."""
    message = validation_warning(0.51, 0.155, recalibrated, 10, 0.99)
    for part in ("is 15.5%, near chance (10.0%)", "training accuracy is 51.0%", f"reach {recalibrated:.1%}"):
        assert part in message
    assert ("moving statistics lag" in message) is ("momentum 0.99" in message) is batchnorm
    assert ("--recalibrate-batches" in message) is batchnorm
    assert ("it is not BatchNorm's moving statistics" in message) is ("overfitting" in message) is not batchnorm
