"""Folders on a node that several users share: nobody reads, forges or redirects what is staged for another."""

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from cifar_dist.data.private import Staging, is_own_file, keep_own, one_at_a_time, private_folder, user_folder
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError

IS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place")
OTHER = 12345  # a user who need not be there


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_this_user_alone(tmp_path):
    old = os.umask(0)
    try:
        folder = user_folder(tmp_path / "new" / "base")
    finally:
        os.umask(old)
    assert folder == tmp_path / "new" / "base" / f"cifar_dist-staged-{os.geteuid()}"
    assert mode(folder) == 0o700


def test_one_that_others_could_read_is_closed(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o755)
    (tmp_path / "folder").chmod(0o777)
    assert mode(private_folder(tmp_path / "folder")) == 0o700


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_a_link_or_a_file_in_its_place_is_refused(tmp_path, kind):
    path, target = tmp_path / "folder", tmp_path / "target"
    if kind == "link":
        target.mkdir()
    path.write_bytes(b"x") if kind == "file" else path.symlink_to(target)
    with pytest.raises(UserError, match="is no folder but a link or file, so what lies there may be forged"):
        private_folder(path)
    assert not target.exists() or not list(target.iterdir())


@IS_ROOT
def test_somebody_else_s_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    os.chown(tmp_path / "folder", OTHER, OTHER)
    with pytest.raises(UserError, match=f"belongs to user {OTHER}, so what lies there may be forged"):
        private_folder(tmp_path / "folder")


@IS_ROOT
def test_somebody_else_s_file_is_not_kept(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.write_bytes(b"")
    theirs.write_bytes(b"")
    os.chown(theirs, OTHER, OTHER)
    assert (is_own_file(mine), is_own_file(theirs)) == (True, False)
    keep_own(mine, theirs, tmp_path / "nothing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path, link):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    link(victim, tmp_path / "file")
    keep_own(tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["train.arrow", "train.arrow.sha256", "train.arrow.lock", "train.arrow.holder"])
def test_staging_follows_no_planted_link(shapes_uri, staging_folder, tmp_path, name):
    """Where the folder was open to others before."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    area = DataSet.open(shapes_uri, Staging(folder=staging_folder)).area
    (area / name).symlink_to(victim)
    (area / f"train.arrow.part-{os.getpid()}").symlink_to(victim)
    assert len(DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")) == 200
    assert victim.read_bytes() == b"precious"
    assert not (area / "train.arrow").is_symlink()


def test_what_is_staged_is_read_by_this_user_only(shapes_uri, staging_folder):
    old = os.umask(0)
    try:
        DataSet.open(shapes_uri, Staging(folder=staging_folder)).stage("train")
    finally:
        os.umask(old)
    folders = [path for path in staging_folder.rglob("*") if path.is_dir()]
    assert folders
    assert {mode(folder) for folder in folders} == {0o700}


@IS_ROOT
def test_two_users_stage_side_by_side(shapes_uri):
    """With the defaults of both, in a temporary folder as /tmp is."""
    with tempfile.TemporaryDirectory() as shared:
        base, data = Path(shared) / "tmp", Path(shared) / "data"
        base.mkdir()
        shutil.copytree(shapes_uri, data)
        base.chmod(0o1777)
        Path(shared).chmod(0o755)
        for user in (OTHER, OTHER + 1):
            process = multiprocessing.get_context("fork").Process(target=stage_as, args=(user, str(data), base))
            process.start()
            process.join(60)
            assert process.exitcode == 0
        assert {p.name for p in base.iterdir()} == {f"cifar_dist-staged-{user}" for user in (OTHER, OTHER + 1)}


def stage_as(user: int, uri: str, folder: Path) -> None:
    os.setgid(user)
    os.setuid(user)
    assert len(DataSet.open(uri, Staging(folder=folder)).stage("train")) == 200


# One at a time.

HOLD = """
import sys, time
from pathlib import Path
from cifar_dist.data.private import one_at_a_time
with one_at_a_time(Path(sys.argv[1]), 60, print, lambda: 0):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "file"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "file")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_wait_for_a_stopped_process_is_said_and_ends(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("cifar_dist.data.private.WORD_SECONDS", 0.5)
    holder.send_signal(signal.SIGSTOP)
    said = []
    with one_at_a_time(tmp_path / "file", 2.0, said.append, lambda: 0):
        pass
    assert said[0] == f"waiting for process {holder.pid} (stopped), which works on {tmp_path / 'file'}"
    assert said[1].startswith(
        f"WARNING: process {holder.pid} (stopped) has not gone on with {tmp_path / 'file'} for 2 s"
    )
    assert len(said) == 2


def test_a_wait_for_a_process_that_goes_on_lasts(tmp_path, holder):
    """As long as what it makes grows."""
    start, said, entered = time.monotonic(), [], threading.Event()
    steps = iter(range(10**9))

    def wait():
        with one_at_a_time(tmp_path / "file", 1.0, said.append, lambda: next(steps)):
            entered.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not entered.wait(3)
    holder.kill()
    assert entered.wait(10)
    assert time.monotonic() - start > 3
    assert said == []


def test_a_lock_of_a_process_that_is_no_more_holds_up_nobody(tmp_path, holder):
    holder.kill()
    holder.wait()
    with one_at_a_time(tmp_path / "file", 60, print, lambda: 0):
        assert (tmp_path / "file.holder").read_text() == str(os.getpid())
    assert FileLock(tmp_path / "file.lock").acquire(timeout=0)
