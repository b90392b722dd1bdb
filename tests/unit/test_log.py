"""A run's log: it is only appended to, a resume cuts it at its checkpoint's mark, nothing else is lost or said twice.

On object stores it is in parts, with the same guarantees; TensorBoard reads what was measured.
"""

import errno
import hashlib
import json
import os
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from cifar_dist.errors import UserError
from cifar_dist.run import log as log_module
from cifar_dist.run.checkpoint import Mark
from cifar_dist.run.log import LOG, RunLog, read_lines, read_log
from cifar_dist.storage import Folder

START = Mark(0, hashlib.sha256(b"").hexdigest())


def add(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.add("step", step // 5, step, train_loss=1 / step, train_accuracy=step / 100)


def filled(run: Path | str, first: int, last: int, mark: Mark | None = None) -> Mark:
    """Stores steps `first` to `last` of a run that goes on at `mark`; returns the mark behind them."""
    log = RunLog(Folder(str(run)), first - 1, mark)
    assert not log.lost
    add(log, first, last)
    taken = log.take()
    log.store(taken)
    log.close()
    return taken.mark


def steps(run: Path | str) -> list[int]:
    return [line["global_step"] for line in read_lines(Folder(str(run)))]


def fits(run: Path | str, mark: Mark) -> bool:
    """Whether the stored log begins with what the mark means."""
    content = read_log(Folder(str(run)))[: mark.num_bytes]
    return len(content) == mark.num_bytes and hashlib.sha256(content).hexdigest() == mark.sha256


def test_a_new_run_has_no_lines(tmp_path):
    assert read_lines(Folder(str(tmp_path))) == []
    log = RunLog(Folder(str(tmp_path)), 0)
    assert (log.lost, log.warnings, log.take().mark) == ("", set(), START)
    assert read_lines(Folder(str(tmp_path))) == []


def test_lines_say_what_was_measured_where(tmp_path):
    log = RunLog(Folder(str(tmp_path)), 0)
    log.add("step", 0, 20, train_loss=2.5, step=20)
    log.add("warning", 0, 20, warning="kind", message="a sentence")
    log.store(log.take())
    expected = [
        {"kind": "step", "epoch": 0, "global_step": 20, "train_loss": 2.5, "step": 20},
        {"kind": "warning", "epoch": 0, "global_step": 20, "warning": "kind", "message": "a sentence"},
    ]
    assert [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()] == expected
    assert read_lines(Folder(str(tmp_path))) == expected


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no name for it, and other programs would refuse the whole file."""
    log = RunLog(Folder(str(tmp_path)), 0)
    log.add("epoch", 0, 20, validation_loss=float("nan"), train_loss=float("inf"), train_accuracy=0.5)
    log.store(log.take())
    (line,) = (json.loads(t, parse_constant=pytest.fail) for t in (tmp_path / LOG).read_text().splitlines())
    assert (line["validation_loss"], line["train_loss"], line["train_accuracy"]) == (None, None, 0.5)


def test_nothing_is_stored_before_store(tmp_path):
    log = RunLog(Folder(str(tmp_path)), 0)
    add(log, 1, 1)
    taken = log.take()
    assert [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()] == [0, 0]
    log.store(taken)
    assert steps(tmp_path) == [1]


def test_what_was_taken_does_not_grow(tmp_path):
    """It belongs to a checkpoint, and is stored while training goes on: a line beyond it would come twice."""
    log = RunLog(Folder(str(tmp_path)), 0)
    add(log, 1, 2)
    taken = log.take()
    add(log, 3, 3)
    log.store(taken)
    assert steps(tmp_path) == [1, 2]
    assert taken.mark.num_bytes == (tmp_path / LOG).stat().st_size
    assert fits(tmp_path, taken.mark)
    log.store(log.take())
    assert steps(tmp_path) == [1, 2, 3]


def test_resume_drops_later_lines_and_goes_on(tmp_path):
    marks = {2: filled(tmp_path, 1, 2)}
    for step in (3, 5, 8):
        marks[step] = filled(tmp_path, max(marks) + 1, step, marks[max(marks)])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]
    filled(tmp_path, 6, 9, marks[5])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    filled(tmp_path, 4, 4, marks[3])
    assert steps(tmp_path) == [1, 2, 3, 4]
    filled(tmp_path, 1, 1)  # no checkpoint: from the beginning
    assert steps(tmp_path) == [1]


def test_a_mark_is_of_all_lines_whoever_wrote_them(tmp_path):
    mark = filled(tmp_path, 4, 6, filled(tmp_path, 1, 3))
    content = (tmp_path / LOG).read_bytes()
    assert mark == Mark(len(content), hashlib.sha256(content).hexdigest())


def test_opening_a_log_at_its_end_changes_nothing_stored(tmp_path):
    mark = filled(tmp_path, 1, 3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    RunLog(Folder(str(tmp_path)), 3, mark).close()
    assert {p: p.read_bytes() for p in before} == before


def test_damaged_lines_are_named(tmp_path):
    filled(tmp_path, 1, 3)
    path = tmp_path / LOG
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(first[:-3] + b"\n" + rest)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged") as error:
        read_lines(Folder(str(tmp_path)))
    assert str(path) in str(error.value)


def test_a_log_is_due_when_it_was_not_taken_for_a_while(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(log_module, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: now))
    log = RunLog(Folder(str(tmp_path)), 0)
    assert not log.is_due
    now += log_module.FLUSH_SECONDS + 1
    assert log.is_due
    log.take()
    assert not log.is_due


# Appending only.


@pytest.fixture
def num_written(monkeypatch) -> Callable[[], int]:
    """Bytes written to local files since the last call."""
    sizes: list[int] = []
    pwrite, write = os.pwrite, Folder.write

    def counted(file: int, content: bytes, offset: int) -> int:
        sizes.append(len(content))
        return pwrite(file, content, offset)

    def counted_whole(self: Folder, name: str, content: bytes) -> None:
        sizes.append(len(content))
        write(self, name, content)

    monkeypatch.setattr(os, "pwrite", counted)
    monkeypatch.setattr(Folder, "write", counted_whole)

    def num() -> int:
        total = sum(sizes)
        sizes.clear()
        return total

    return num


def test_storing_lines_writes_those_and_no_others(tmp_path, num_written):
    """However many are stored already, and whether they came from this process or an earlier one."""
    found = []
    for num_before in (0, 10, 3000):
        run = tmp_path / str(num_before)
        mark = filled(run, 1000, 999 + num_before)
        log = RunLog(Folder(str(run)), 0, mark)
        num_written()
        for _ in range(3):
            add(log, 7000, 7004)
            log.store(log.take())
            found.append(num_written())
        assert steps(run)[num_before:] == [*range(7000, 7005)] * 3
    first_events = found[0] - found[1]  # TensorBoard's own opening, once for each attempt
    assert 0 < first_events < 200
    assert found == [found[0], found[1], found[1]] * 3
    lines = read_log(Folder(str(tmp_path / "0")))
    assert len(lines) // 3 < found[1] < len(lines)  # five lines, and two events for each of them


def test_taking_holds_up_training_with_the_new_lines_only(tmp_path):
    """No copy of the lines so far: of a long log it would take longer with each checkpoint."""
    log = RunLog(Folder(str(tmp_path)), 0)
    add(log, 1, 1)
    small = log.take()
    log.store(small)
    add(log, 1000, 8999)
    log.store(log.take())
    add(log, 1, 1)
    tracemalloc.start()
    taken = log.take()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken.lines == small.lines
    assert len(taken.events) < len(small.events)
    assert most < 20_000 < taken.mark.num_bytes / 40


# A process that is killed while it appends.


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


def values_of(found: list[Event]) -> dict[tuple[str, int], float]:
    return {(v.tag, e.step): v.simple_value for e in found for v in e.summary.value}


@pytest.mark.parametrize("cut", [0, 1, 30])
@pytest.mark.parametrize("left", [b"", b"\0" * 50, b'{"kind": "st', b"no line\nat all\n"])
def test_what_a_kill_left_behind_the_mark_is_read_over_and_cut_by_the_resume(tmp_path, cut, left):
    """Whole lines behind the mark, the last one cut off, or bytes of any kind."""
    mark = filled(tmp_path, 1, 4)
    filled(tmp_path, 5, 8, mark)
    path = tmp_path / LOG
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut] + left)
    if b"\n" not in left:
        assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, *[8] * (cut == 0)]
    filled(tmp_path, 5, 6, mark)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes() == whole[: path.stat().st_size]


@pytest.mark.parametrize("written", [0, 1, 40])
def test_a_write_that_is_tried_again_writes_the_same_bytes_to_the_same_place(tmp_path, monkeypatch, written):
    """It failed after a part of them; TensorBoard's events too."""
    log = RunLog(Folder(str(tmp_path), 60.0), 0)
    add(log, 1, 3)
    log.store(log.take())
    pwrite, failed = os.pwrite, set[int]()

    def fails_once(file: int, content: bytes, offset: int) -> int:
        if file in failed:
            return pwrite(file, content, offset)
        failed.add(file)
        pwrite(file, content[:written], offset)
        raise OSError(errno.EIO, "for once")

    monkeypatch.setattr(os, "pwrite", fails_once)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    add(log, 4, 6)
    taken = log.take()
    log.store(taken)
    add(log, 7, 7)
    log.store(log.take())
    assert len(failed) == 2
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert fits(tmp_path, taken.mark)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [step for tag, step in values_of(events(file)) if tag == "step/train_loss"] == [1, 2, 3, 4, 5, 6, 7]


def test_a_system_that_writes_few_bytes_at_a_time_stores_all(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: pwrite(file, content[:7], offset))
    assert fits(tmp_path, filled(tmp_path, 1, 5))
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_a_full_disk_is_said_and_what_was_stored_is_kept(tmp_path, monkeypatch):
    log = RunLog(Folder(str(tmp_path)), 0)
    add(log, 1, 2)
    taken = log.take()
    log.store(taken)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        add(log, 3, 3)
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*make room"):
            log.store(log.take())
    filled(tmp_path, 3, 4, taken.mark)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_an_older_process_cannot_write_into_the_log_of_a_newer_attempt(tmp_path):
    """It may be in the midst of a write when it is taken over: it has the file open still."""
    old = RunLog(Folder(str(tmp_path)), 0)
    add(old, 1, 2)
    mark = old.take()
    old.store(mark)
    new = RunLog(Folder(str(tmp_path)), 2, mark.mark)
    add(old, 3, 9)
    old.store(old.take())
    assert steps(tmp_path) == [1, 2]
    add(new, 3, 3)
    taken = new.take()
    new.store(taken)
    add(old, 10, 10)
    old.store(old.take())
    assert steps(tmp_path) == [1, 2, 3]
    assert fits(tmp_path, taken.mark)


def test_it_has_no_file_that_a_kill_would_leave_and_closed_none_open(tmp_path, monkeypatch):
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    num_open = len(os.listdir("/proc/self/fd"))
    log = RunLog(Folder(str(tmp_path / "run")), 0)
    assert not list(local.iterdir())
    log.close()
    assert len(os.listdir("/proc/self/fd")) == num_open


# A log that is not the one that the checkpoint was written with.


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda _: None,
    "emptied": lambda _: b"",
    "shortened": lambda content: content[: content.index(b"\n") + 1],
    "a byte short": lambda content: content[:-1],
    "one byte": lambda content: content.replace(b'"epoch": 0', b'"epoch": 1', 1),
    "one line more in front": lambda content: b"{}\n" + content,
}


def damage_log(run: Folder, damage: str) -> bytes | None:
    """Does it; returns what is left."""
    left = DAMAGES[damage](run.read(LOG))
    if left is None:
        run.delete(LOG)
    else:
        run.write(LOG, left)
    return left


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_that_does_not_fit_the_mark_is_put_aside_and_a_new_one_begins(tmp_path, damage):
    mark, run = filled(tmp_path, 1, 4), Folder(str(tmp_path))
    left = damage_log(run, damage)
    log = RunLog(Folder(str(tmp_path)), 4, mark)
    aside = [name for name in run.names() if name.startswith(f"{LOG}.damaged-")]
    assert [run.read(name) for name in aside] == [left] * bool(left)
    assert str(tmp_path / LOG) in log.lost
    assert "is not the log that the checkpoint was written with; a new one begins" in log.lost
    assert "\n" not in log.lost
    assert all(name in log.lost for name in aside)
    assert log.warnings == set()
    assert steps(tmp_path) == []
    add(log, 5, 6)
    taken = log.take()
    log.store(taken)
    assert steps(tmp_path) == [5, 6]
    filled(tmp_path, 7, 7, taken.mark)  # which fits again
    assert steps(tmp_path) == [5, 6, 7]


def test_a_log_that_was_put_aside_is_no_part_of_the_new_one(s3_uri, monkeypatch):
    monkeypatch.setattr(log_module, "PART_BYTES", 150)
    mark, run = in_parts(s3_uri, 6)[-1], Folder(s3_uri)
    damage_log(run, "one byte")
    left = read_log(run)
    log = RunLog(Folder(s3_uri), 6, mark)
    (aside,) = [name for name in run.names() if name.startswith(f"{LOG}.damaged-")]
    assert (run.read(aside), aside in log.lost, parts(run)) == (left, True, [LOG])
    add(log, 7, 8)
    taken = log.take()
    log.store(taken)
    filled(s3_uri, 9, 9, taken.mark)
    assert steps(s3_uri) == [7, 8, 9]


# Warnings, which are recorded once.


def test_a_log_knows_its_warnings_also_after_a_resume(tmp_path):
    log = RunLog(Folder(str(tmp_path)), 0)
    log.add("warning", 0, 1, warning="first", message="a sentence")
    log.add("step", 0, 2, note='of "kind": "warning", so to say')
    mark = log.take()
    log.store(mark)
    log.add("warning", 0, 3, warning="second", message="behind the mark")
    assert log.warnings == {"first", "second"}
    log.store(log.take())
    assert RunLog(Folder(str(tmp_path)), 2, mark.mark).warnings == {"first"}


# Object stores.


def in_parts(uri: str, num: int) -> list[Mark]:
    """A log of `num` lines, each stored by itself, of which two go into a part; the mark behind each."""
    log, marks = RunLog(Folder(uri), 0), []
    for step in range(1, num + 1):
        log.add("step", 0, step, train_loss=step + 0.5)
        taken = log.take()
        log.store(taken)
        marks.append(taken.mark)
    log.close()
    return marks


def parts(run: Folder) -> list[str]:
    return [name for name in run.names() if name.endswith(".jsonl")]


def test_record_in_a_bucket(s3_uri):
    run = Folder(s3_uri)
    assert read_lines(run) == []
    log = RunLog(Folder(s3_uri), 0)
    for step in (1, 2):
        log.add("step", 0, step, train_loss=1 / step)
        log.store(log.take())
    assert steps(s3_uri) == [1, 2]
    (name,) = run.names("tensorboard")
    found = [v.simple_value for e in parsed(run.read(f"tensorboard/{name}")) for v in e.summary.value]
    assert found == [1.0, 0.5]


def test_a_log_in_a_bucket_grows_by_parts(s3_uri, monkeypatch, num_written):
    """What is written with each line does not grow with the log."""
    monkeypatch.setattr(log_module, "PART_BYTES", 150)
    run = Folder(s3_uri)
    marks = in_parts(s3_uri, 7)
    size = marks[0].num_bytes
    assert parts(run) == [f"metrics-{2 * size * i:015d}.jsonl" for i in (1, 2, 3)] + [LOG]
    assert steps(s3_uri) == [1, 2, 3, 4, 5, 6, 7]
    assert all(fits(s3_uri, mark) for mark in marks)
    event_parts = run.names("tensorboard")
    assert len(event_parts) > 2
    found = [e for name in event_parts for e in parsed(run.read(f"tensorboard/{name}"))]
    assert values_of(found) == {("step/train_loss", step): step + 0.5 for step in range(1, 8)}
    assert all("tfevents" in name for name in event_parts)  # or TensorBoard would not read it
    num_written()
    log = RunLog(Folder(s3_uri), 7, marks[-1])
    num_written()
    for step in (8, 9, 10, 11):
        log.add("step", 0, step, train_loss=step + 0.5)
        log.store(log.take())
        assert num_written() < 2 * 150 + 10


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resume_in_the_midst_of_parts_goes_on_there(s3_uri, monkeypatch, step):
    monkeypatch.setattr(log_module, "PART_BYTES", 150)
    run, marks = Folder(s3_uri), in_parts(s3_uri, 5)
    assert len(parts(run)) == 3
    log = RunLog(Folder(s3_uri), step, marks[step - 1])
    assert (log.lost, parts(run), steps(s3_uri)) == ("", [LOG], [*range(1, step + 1)])
    for more in (1, 2, 3):
        log.add("step", 0, step + more, train_loss=0.25)
        taken = log.take()
        log.store(taken)
        assert steps(s3_uri) == [*range(1, step + more + 1)]
        assert fits(s3_uri, taken.mark)
    assert fits(s3_uri, marks[step - 1])


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_deleted", [0, 1])
def test_a_resume_that_is_killed_before_it_has_deleted_the_parts_loses_nothing(s3_uri, monkeypatch, step, num_deleted):
    monkeypatch.setattr(log_module, "PART_BYTES", 150)
    run, mark = Folder(s3_uri), in_parts(s3_uri, 6)[step - 1]
    delete, left = Folder.delete, [num_deleted]

    def killed(self: Folder, name: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        delete(self, name)

    for _ in range(2):
        left[0] = num_deleted
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "delete", killed)
            if len(parts(run)) > 1 + num_deleted:
                with pytest.raises(KeyboardInterrupt):
                    RunLog(Folder(s3_uri), step, mark)
        assert fits(s3_uri, mark)
        found = steps(s3_uri)  # no hole, and none twice
        assert found == [*range(1, max(step, len(found)) + 1)]
    log = RunLog(Folder(s3_uri), step, mark)
    assert (log.lost, parts(run), steps(s3_uri)) == ("", [LOG], [*range(1, step + 1)])


# TensorBoard.


def test_tensorboard_events_can_be_read_back(tmp_path):
    filled(tmp_path, 1, 3)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    expected = {("step/train_loss", s): 1 / s for s in (1, 2, 3)}
    expected |= {("step/train_accuracy", s): s / 100 for s in (1, 2, 3)}
    assert values_of(events(file)) == pytest.approx(expected)


def test_tensorboard_is_told_to_drop_what_a_resume_repeats(tmp_path):
    mark = filled(tmp_path, 1, 2)
    filled(tmp_path, 3, 3, mark)
    first = set((tmp_path / "tensorboard").iterdir())
    filled(tmp_path, 3, 4, mark)
    (file,) = set((tmp_path / "tensorboard").iterdir()) - first  # the earlier attempts' files are kept
    starts = [e.step for e in events(file) if e.HasField("session_log")]
    assert starts == [3]
