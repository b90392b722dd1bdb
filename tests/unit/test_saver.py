"""The saver: what it stores is what was there when save() was called, in order, and nothing once the run is another's.

A process that is killed at any point of a write leaves a run that can be continued.
"""

import errno
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import EXPECT, meta_of, same, state, tree, without_log

from cifar_dist.errors import UserError
from cifar_dist.run import log as log_module
from cifar_dist.run.checkpoint import CheckpointState, Cursor, Mark
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.folder import Run
from cifar_dist.run.log import read_lines, read_log
from cifar_dist.run.ownership import Attempts
from cifar_dist.storage import Folder
from cifar_dist.train import saver as saver_module
from cifar_dist.train.saver import Saver

A, B = "aaaaaaaa", "bbbbbbbb"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Gate(Attempts):
    """Claims at which the saver's thread is held: the `left`-th check waits until it is let through."""

    left: int
    reached: threading.Event
    passed: threading.Event

    def check(self, number: int) -> None:
        self.left -= 1
        if self.left == 0:
            self.reached.set()
            assert self.passed.wait(60)
        super().check(number)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    """Opened at the end whatever happens: a thread that is still held would hold up the end of the tests."""
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.passed.set()


def saver_of(uri: str, driver: str = A, num_kept: int = 9, device: str = "cpu", mark: Mark | None = None) -> Saver:
    """Of a new attempt."""
    attempt = Attempts(Folder(uri), driver).claim(takeover=True)
    return Saver(Run(uri), driver, attempt, device=torch.device(device), global_step=0, mark=mark, num_kept=num_kept)


def held(saver: Saver, gates: list[Gate], call: int = 1) -> Gate:
    """The saver's thread will wait at its `call`-th fence from now: the log's, the checkpoint's two."""
    gate = Gate(saver.attempts.run, saver.attempts.driver)
    gate.left, gate.reached, gate.passed = call, threading.Event(), threading.Event()
    saver.attempts = gate
    gates.append(gate)
    return gate


def save(saver: Saver, epoch: int, whole: CheckpointState | None = None) -> None:
    saver.save(Cursor(epoch, 0), whole or state(epoch), meta_of())


def moved(tree: Any, device: str) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: moved(value, device) for key, value in tree.items()}
    return [moved(value, device) for value in tree] if isinstance(tree, list) else tree


def spoil(tree: Any) -> None:
    """Changes everything in place, as training does."""
    if isinstance(tree, torch.Tensor):
        tree.fill_(-99)
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, torch.Tensor | dict | list):
            spoil(value)
        else:
            tree[key] = "spoilt"


# What is stored.


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_saved_is_a_copy(uri, gates, device):
    """Training changes the weights in place while they are being stored."""
    saver = saver_of(uri, device=device)
    gate = held(saver, gates)
    whole = CheckpointState(**moved(vars(state(1)), device))
    save(saver, 1, whole)
    spoil(vars(whole))
    assert not same(CheckpointState(**moved(vars(whole), "cpu")), state(1))
    assert Checkpoints(uri).latest() is None  # nothing of it was stored before it was changed
    gate.passed.set()
    saver.wait()
    _, loaded = Checkpoints(uri).load_newest(EXPECT)
    assert same(without_log(loaded), without_log(state(1)))


def test_the_state_that_was_saved_is_left_as_it_was(uri):
    saver, whole = saver_of(uri), state(1)
    save(saver, 1, whole)
    saver.wait()
    assert same(whole, state(1))


def test_optional_parts_may_be_missing(uri):
    saver, whole = saver_of(uri), replace(state(1), average=None, ranks={})
    save(saver, 1, whole)
    saver.wait()
    _, loaded = Checkpoints(uri).load_newest(EXPECT)
    assert same(without_log(loaded), without_log(whole))


def steps(uri: str) -> list[int]:
    return [line["global_step"] for line in read_lines(Folder(uri))]


def test_a_checkpoint_holds_the_logs_mark_and_the_lines_up_to_it_are_stored_first(uri, gates):
    saver = saver_of(uri)
    saver.log.add("step", 0, 1, train_loss=2.0)
    gate = held(saver, gates, 2)  # before the checkpoint
    save(saver, 1)
    saver.log.add("step", 0, 2, train_loss=1.0)  # after the checkpoint: a resume will bring it again
    assert gate.reached.wait(60)
    assert steps(uri) == [1]
    gate.passed.set()
    saver.wait()
    _, loaded = Checkpoints(uri).load_newest(EXPECT)
    content = read_log(Folder(uri))
    assert loaded.log == Mark(len(content), hashlib.sha256(content).hexdigest())
    save(saver, 2)  # with the line that had come
    saver.wait()
    assert steps(uri) == [1, 2]
    resumed = saver_of(uri, mark=loaded.log)
    resumed.log.add("step", 0, 2, train_loss=0.25)
    save(resumed, 2)
    resumed.wait()
    assert steps(uri) == [1, 2]
    assert [line["train_loss"] for line in read_lines(Folder(uri))] == [2.0, 0.25]
    _, again = Checkpoints(uri).load_newest(EXPECT)
    content = read_log(Folder(uri))
    assert again.log == Mark(len(content), hashlib.sha256(content).hexdigest())


def test_checkpoints_do_not_grow_with_the_log(uri):
    saver = saver_of(uri)
    sizes = []
    for epoch in (1, 2):
        saver.log.add("samples", 0, 1, ids=[1] * 10_000 * epoch)
        save(saver, epoch)
        saver.wait()
        sizes.append(sum(map(len, tree(Path(uri) / "checkpoints" / Checkpoints(uri).latest().name).values())))
    assert abs(sizes[1] - sizes[0]) < 100


def test_it_has_no_file_of_its_own_that_a_kill_would_leave_and_closed_it_has_stored_all(uri, tmp_path, monkeypatch):
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    saver = saver_of(uri)
    assert not list(local.glob("cifar_dist*"))
    saver.log.add("step", 0, 2, train_loss=1.0)
    save(saver, 1)
    saver.close()
    assert not list(local.glob("cifar_dist*"))
    assert steps(uri) == [2]
    assert Checkpoints(uri).latest()
    assert Folder(uri).names("tensorboard")


def test_the_newest_and_the_best_are_kept(uri):
    saver = saver_of(uri, num_kept=2)
    for epoch, score in enumerate([(0.1, 1.0), (0.9, 1.0), None, None, None], 1):
        saver.save(Cursor(epoch, 0), state(epoch), meta_of(score))
        saver.wait()
    assert [c.cursor.epoch for c in Checkpoints(uri).all()] == [2, 4, 5]


def test_checkpoints_are_of_the_savers_attempt(uri):
    for attempt in (1, 2):
        saver = saver_of(uri)
        save(saver, 1)
        saver.wait()
        latest = Checkpoints(uri).latest()
        assert (latest.meta["attempt"], latest.name) == (attempt, f"epoch-0001-step-000000-attempt-000{attempt}")


# The thread.


def test_while_one_checkpoint_is_written_there_are_two_copies_at_most(uri, gates, monkeypatch):
    """However many come: what was dropped is gone from memory too."""
    copies = weakref.WeakSet()

    class Copy(CheckpointState):
        def __init__(self, **content: Any) -> None:
            super().__init__(**content)
            copies.add(self)

        __hash__ = object.__hash__

    saver = saver_of(uri)
    gate = held(saver, gates, 2)
    monkeypatch.setattr(saver_module, "CheckpointState", Copy)
    for epoch in range(1, 7):
        save(saver, epoch)
        assert gate.reached.wait(60)
        gc.collect()
        assert len(copies) == min(epoch, 2)
    gate.passed.set()
    saver.wait()
    assert [c.cursor.epoch for c in Checkpoints(uri).all()] == [1, 6]


def test_every_checkpoint_is_stored_if_none_may_be_dropped(uri, gates):
    saver = saver_of(uri)
    saver.may_drop = False
    gate = held(saver, gates, 2)
    with ThreadPoolExecutor(1) as pool:
        calls = [pool.submit(save, saver, epoch) for epoch in (1, 2, 3)]
        assert gate.reached.wait(60)
        calls[1].result(60)
        with pytest.raises(TimeoutError):
            calls[2].result(0.2)
        gate.passed.set()
        calls[2].result(60)
    saver.wait()
    assert [c.cursor.epoch for c in Checkpoints(uri).all()] == [1, 2, 3]


def test_after_an_error_nothing_more_is_written(uri, gates, monkeypatch):
    """Or a checkpoint would name a log that is not there, and the next start would begin another."""
    saver = saver_of(uri)
    save(saver, 1)
    saver.wait()
    gate = held(saver, gates)
    store = saver.log.store

    def fail_once(_taken: Any) -> None:
        saver.log.store = store
        raise OSError(errno.EIO, "it was not written")

    monkeypatch.setattr(saver.log, "store", fail_once)
    for epoch in (2, 3):
        saver.log.add("step", epoch, epoch, train_loss=1.0)
        save(saver, epoch)
    assert gate.reached.wait(60)
    gate.passed.set()
    for _ in range(2):
        with pytest.raises(OSError, match="it was not written"):
            saver.wait()
    settle(saver)
    assert [c.cursor.epoch for c in Checkpoints(uri).all()] == [1]
    assert steps(uri) == []
    resumed = saver_of(uri, mark=Checkpoints(uri).load_newest(EXPECT)[1].log)
    assert not resumed.log.lost


@pytest.mark.parametrize(
    ("best", "stored"),
    [
        ((), [1, 4]),  # each newer one takes the place of the one that waits
        ((1,), [1, 4]),
        ((2, 3), [1, 3, 4]),  # 3 is better than 2; 4 is not better than 3
        ((2, 3, 4), [1, 4]),
    ],
)
def test_while_one_checkpoint_is_written_the_best_and_the_newest_wait(uri, gates, best, stored):
    """Of 1 to 4. The call for 4 waits only where 3 must not be dropped, until 1 is stored."""
    saver = saver_of(uri)
    gate = held(saver, gates, 2)  # the first checkpoint's, after the log's
    for epoch in (1, 2, 3):
        saver.log.add("step", epoch, epoch, train_loss=1.0)
        saver.save(Cursor(epoch, 0), state(epoch), meta_of(), is_best=epoch in best)
    assert gate.reached.wait(60)
    saver.log.add("step", 4, 4, train_loss=1.0)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(saver.save, Cursor(4, 0), state(4), meta_of(), is_best=4 in best)
        if 3 in stored:
            with pytest.raises(TimeoutError):
                last.result(0.2)
        else:
            last.result(60)
        gate.passed.set()
        last.result(60)
    saver.wait()
    checkpoints = Checkpoints(uri)
    assert [c.cursor.epoch for c in checkpoints.all()] == stored
    assert steps(uri) == [1, 2, 3, 4]  # nothing of the log is dropped
    for checkpoint in checkpoints.all():
        loaded = checkpoints.load(checkpoint)
        assert same(without_log(loaded), without_log(state(checkpoint.cursor.epoch)))
        content = read_log(Folder(uri))[: loaded.log.num_bytes]
        assert len(content.splitlines()) == checkpoint.cursor.epoch
    assert saver.stall_seconds > 0


def test_the_log_is_stored_when_it_is_due_and_nothing_else_is_being_stored(uri, gates, monkeypatch):
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", 1e9)
    saver = saver_of(uri)
    saver.log.add("step", 0, 1, train_loss=1.0)
    saver.flush_if_due()
    saver.wait()
    assert read_lines(Folder(uri)) == []
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", -1.0)
    saver.flush_if_due()
    saver.wait()
    assert steps(uri) == [1]
    gate = held(saver, gates)
    save(saver, 1, state(1))
    saver.log.add("step", 0, 2, train_loss=1.0)
    saver.flush_if_due()  # does not wait for the checkpoint
    gate.passed.set()
    saver.wait()
    assert steps(uri) == [1]


CALLS = {
    "wait": lambda saver: saver.wait(),
    "save": lambda saver: save(saver, 2),
    "flush_if_due": lambda saver: saver.flush_if_due(),
}


def settle(saver: Saver) -> None:
    """Until the thread has done what it was given, without asking how that went."""
    saver._pool.submit(lambda: None).result()


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_the_thread_is_raised_by_the_next_call(uri, call, monkeypatch):
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", -1.0)
    saver = saver_of(uri)
    (Path(uri) / "checkpoints").write_text("where the checkpoints should be")
    save(saver, 1)
    settle(saver)
    for _ in range(2):  # and by every call after it
        with pytest.raises(UserError, match=r"cannot \w+ .*/checkpoints"):
            CALLS[call](saver)
    assert (Path(uri) / "checkpoints").read_text() == "where the checkpoints should be"


@pytest.mark.parametrize("call", CALLS)
def test_an_error_that_is_no_users_fault_is_raised_as_it_is(uri, call, monkeypatch):
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", -1.0)
    saver = saver_of(uri)
    save(saver, 1, replace(state(1), optimizer={"cannot be pickled": threading.Lock()}))
    settle(saver)
    with pytest.raises(TypeError, match="pickle"):
        CALLS[call](saver)
    assert Checkpoints(uri).all() == []


def test_an_error_while_the_log_is_stored_is_raised_too(uri, monkeypatch):
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", -1.0)
    saver = saver_of(uri)
    saver.log.add("step", 0, 1, train_loss=1.0)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    saver.flush_if_due()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl"):
        saver.wait()


# A run that was taken over.


def test_a_stale_saver_stores_nothing_more(uri, monkeypatch):
    old = saver_of(uri, A, num_kept=1)
    for epoch in (1, 2):
        save(old, epoch)
        old.wait()
    new = saver_of(uri, B)
    for epoch in (1, 2):
        new.log.add("step", epoch, epoch, train_loss=1.0)
        save(new, epoch, state(epoch + 10))
        new.wait()
    before = tree(Path(uri))
    monkeypatch.setattr(log_module, "FLUSH_SECONDS", -1.0)
    old.log.add("step", 9, 9, train_loss=9.0)
    old.flush_if_due()
    with pytest.raises(UserError, match="taken over as attempt 2 by process"):
        old.wait()
    with pytest.raises(UserError, match="taken over as attempt 2 by process"):
        Saver(
            Run(uri), A, 1, device=torch.device("cpu"), global_step=0, mark=None, num_kept=1
        )  # which would cut the log
    assert tree(Path(uri)) == before
    save(new, 3)
    new.wait()
    assert [(c.meta["attempt"], c.cursor.epoch) for c in Checkpoints(uri).all()] == [(1, 2), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_saver_that_becomes_stale_while_it_stores_publishes_nothing(uri, gates, call):
    """It is held at each of its fences while another driver takes the run over and stores the same epochs."""
    old = saver_of(uri, A, num_kept=1)
    save(old, 1)
    old.wait()
    gate = held(old, gates, call)
    old.log.add("step", 9, 9, train_loss=9.0)
    save(old, 2, state(9))
    assert gate.reached.wait(60)
    new = saver_of(uri, B, num_kept=2)
    for epoch in (1, 2, 3):
        new.log.add("step", epoch, epoch, train_loss=1.0)
        save(new, epoch)
        new.wait()
    before = tree(Path(uri))
    gate.passed.set()
    with pytest.raises(UserError, match="taken over as attempt 2 by process"):
        old.wait()
    assert tree(Path(uri)) == before
    assert [(c.meta["attempt"], c.cursor.epoch) for c in Checkpoints(uri).all()] == [(2, 2), (2, 3)]
    assert steps(uri) == [1, 2, 3]


def test_what_a_saver_left_when_it_was_taken_over_is_cleaned_up(uri, gates):
    """Here it gives up after the new one's last clean-up; its half-written folder goes with the next one."""
    old = saver_of(uri, A)
    gate = held(old, gates, 3)
    save(old, 7)
    assert gate.reached.wait(60)
    new = saver_of(uri, B, num_kept=1)
    assert Folder(uri).names("checkpoints") == ["epoch-0007-step-000000-attempt-0001"]
    gate.passed.set()
    with pytest.raises(UserError, match="taken over"):
        old.wait()
    assert Checkpoints(uri).all() == []
    save(new, 1)
    new.wait()
    assert Folder(uri).names("checkpoints") == ["epoch-0001-step-000000-attempt-0002"]


def test_workers_that_were_started_again_make_the_ones_before_stale(uri):
    """By the same driver: a worker of the group before may be alive still."""
    old, new = saver_of(uri, A), saver_of(uri, A)
    save(old, 1)
    with pytest.raises(UserError, match="taken over as attempt 2"):
        old.wait()
    save(new, 1)
    new.wait()
    assert [c.meta["attempt"] for c in Checkpoints(uri).all()] == [2]


def test_a_saver_on_s3(s3_uri):
    saver = saver_of(s3_uri, num_kept=1)
    for epoch in (1, 2):
        save(saver, epoch)
    saver.wait()
    (checkpoint,) = Checkpoints(s3_uri).all()
    assert checkpoint.cursor == Cursor(2, 0)
    assert same(without_log(Checkpoints(s3_uri).load(checkpoint, EXPECT)), without_log(state(2)))
    new = saver_of(s3_uri, B)
    save(saver, 3)
    with pytest.raises(UserError, match="taken over as attempt 2 by process"):
        saver.wait()
    save(new, 4)
    new.wait()
    assert [(c.meta["attempt"], c.cursor.epoch) for c in Checkpoints(s3_uri).all()] == [(1, 2), (2, 4)]


# A process that is killed.


def test_a_crash_at_any_point_of_a_write_leaves_the_checkpoint_before_or_the_new_one(tmp_path):
    """Real processes kill themselves at one function call after the other, or are killed in the midst of a file.

    Each writes its second checkpoint and cleans up. Then the newest checkpoint is whole and as it was written, nothing
    is said to be damaged, the log can be read, and the next checkpoint of a new attempt leaves nothing but itself.
    """
    script = Path(__file__).with_name("killed_writer.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "24"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row for row in rows if row["found"] not in (1, 2)] == []
    assert [row["where"] for row in rows if not row["signal"]] == []  # each was killed indeed
    assert len(rows) >= 40
    in_order = [row["found"] for row in rows if row["where"].startswith("event")]
    # Up to some point the first checkpoint is the newest, from there on the second one; both were seen.
    assert in_order == sorted(in_order)
    assert set(in_order) == {1, 2}
