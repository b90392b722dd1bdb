"""A run's record: later lines go at a resume, nothing else is lost, TensorBoard can read it; chance."""

import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from cifar_dist.storage import Folder
from cifar_dist.train.metrics import RunLog, chance_warning, read_lines


def filled(run: Path, first: int, last: int) -> RunLog:
    log = RunLog(str(run), first - 1)
    for step in range(first, last + 1):
        log.add("step", step // 5, step, train_loss=1 / step, train_accuracy=step / 100)
    log.flush()
    return log


def steps(run: Path) -> list[int]:
    return [line["global_step"] for line in read_lines(Folder(str(run)))]


def test_a_new_run_has_no_lines(tmp_path):
    assert read_lines(Folder(str(tmp_path))) == []
    assert RunLog(str(tmp_path), 0).lines == []


def test_lines_say_what_was_measured_where(tmp_path):
    log = RunLog(str(tmp_path), 0)
    log.add("step", 0, 20, train_loss=2.5, step=20)
    log.add("warning", 0, 20, warning="kind", message="a sentence")
    log.flush()
    expected = [
        {"kind": "step", "epoch": 0, "global_step": 20, "train_loss": 2.5, "step": 20},
        {"kind": "warning", "epoch": 0, "global_step": 20, "warning": "kind", "message": "a sentence"},
    ]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected
    assert read_lines(Folder(str(tmp_path))) == expected


def test_nothing_is_stored_before_it_is_flushed(tmp_path):
    """What is stored must match a checkpoint: lines beyond it would come twice."""
    log = RunLog(str(tmp_path), 0)
    log.add("step", 0, 1, train_loss=1.0)
    assert steps(tmp_path) == []
    log.flush()
    log.flush()
    assert steps(tmp_path) == [1]


def test_resume_drops_later_lines_and_goes_on(tmp_path):
    filled(tmp_path, 1, 8)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    filled(tmp_path, 6, 9)  # the checkpoint was of step 5
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    filled(tmp_path, 4, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_opening_a_log_changes_nothing_stored(tmp_path):
    filled(tmp_path, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    RunLog(str(tmp_path), 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# TensorBoard.


def events(file: Path) -> list[Event]:
    """A TFRecord file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    content, found, at = file.read_bytes(), [], 0
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
    filled(tmp_path, 1, 3)
    first = set((tmp_path / "tensorboard").iterdir())
    filled(tmp_path, 3, 4)
    (file,) = set((tmp_path / "tensorboard").iterdir()) - first  # the earlier attempt's file is kept
    starts = [e.step for e in events(file) if e.HasField("session_log")]
    assert starts == [3]


# Accuracy at chance.


def test_accuracy_above_chance_is_not_warned_of():
    assert chance_warning(0.5, 0.4, 1000, 10, 0.99) is None
    assert chance_warning(0.5, None, 1000, 10, 0.99) is None


def test_training_at_chance_is_named_before_validation():
    kind, message = chance_warning(0.11, 0.1, 1000, 10, 0.99)
    assert kind == "train_at_chance"
    assert "training accuracy is 11.0%, chance is 10.0%" in message
    assert "learning rate" in message


def test_validation_at_chance_names_the_moving_statistics():
    """The deck's 10% val_accuracy."""
    kind, message = chance_warning(0.48, 0.13, 500, 10, 0.99)
    assert kind == "validation_at_chance"
    assert "momentum 0.99" in message
    assert "moving statistics" in message


@pytest.mark.parametrize(("accuracy", "num_seen", "warned"), [(0.128, 1000, True), (0.129, 1000, False)])
@pytest.mark.parametrize("of", ["train", "validation"])
def test_chance_is_within_three_standard_errors(of, accuracy, num_seen, warned):
    """At 1000 images the error is sqrt(0.1 * 0.9 / 1000) = 0.0095, so the limit is 0.1285."""
    train, validation = (accuracy, None) if of == "train" else (0.9, accuracy)
    assert (chance_warning(train, validation, num_seen, 10, 0.99) is not None) is warned


def test_more_images_make_the_warning_stricter():
    assert chance_warning(0.12, None, 100, 10, 0.99)
    assert not chance_warning(0.12, None, 10_000, 10, 0.99)


def test_too_few_images_are_no_reason_to_warn() -> None:
    assert chance_warning(1.0, None, 8, 2, 0.99) is None
    assert chance_warning(0.9, 0.9, 10, 2, 0.99) is None
    assert chance_warning(0.5, None, 1000, 2, 0.99) is not None
