"""Folders and files on a node that belong to this user alone, so that what lies in them can be trusted."""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_dist.errors import UserError

WORD_SECONDS = 5.0  # after which a wait for a lock is said


def default_folder() -> str:
    """The folder for temporary files. Raises UserError if there is none that can be written to."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"no folder for temporary files can be written to ({error}); set TMPDIR to one") from error


def user_folder(base: Path) -> Path:
    """BASE/cifar_dist-staged-UID, readable and writable by this user alone.

    Raises UserError if it is a link, or somebody else's: what lies in it may be forged.
    """
    path = base / f"cifar_dist-staged-{os.geteuid()}"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {base} for staged data: {error}; set --staging-folder") from error
    return private_folder(path)


def private_folder(path: Path) -> Path:
    """The folder, made with mode 0700 if it is not there. Raises UserError as user_folder does."""
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o700)
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            kind = f"belongs to user {info.st_uid}" if stat.S_ISDIR(info.st_mode) else "is no folder but a link or file"
            raise UserError(
                f"{path} {kind}, so what lies there may be forged and is not used; remove it, or set --staging-folder "
                "to a folder of your own"
            )
        if info.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise UserError(f"cannot use {path} for staged data: {error}; set --staging-folder") from error
    return path


def is_own_file(path: Path) -> bool:
    """Whether it is a plain file of this user under this one name: no link, nobody else's."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1


def keep_own(*paths: Path) -> None:
    """Removes the paths that are not plain files of this user. A link is removed, its target is left alone."""
    for path in paths:
        if not is_own_file(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(
    path: Path, limit_seconds: float, say: Callable[[str], None], progress: Callable[[], object]
) -> Iterator[None]:
    """Holds the lock PATH.lock, beside which PATH.holder names the process.

    A wait is said. Where `progress()` stays the same for `limit_seconds`, and the holder computes nothing, it is
    stopped or hangs, and the caller goes on without the lock: it must write under names of its own.
    """
    lock_file, holder_file = path.with_name(path.name + ".lock"), path.with_name(path.name + ".holder")
    keep_own(lock_file, holder_file)
    lock = FileLock(lock_file, mode=0o600)
    start = since = time.monotonic()
    said, last = False, (progress(), cpu_ticks(holder_file))
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            now, at = (progress(), cpu_ticks(holder_file)), time.monotonic()
            if now != last:
                last, since = now, at
            holder = name_holder(holder_file)
            if at - start > WORD_SECONDS and not said:
                said = True
                say(f"waiting for {holder}, which works on {path}")
            if at - since > limit_seconds:
                say(
                    f"WARNING: {holder} has not gone on with {path} for {at - since:.0f} s: this process does it itself"
                )
                break
    try:
        if lock.is_locked:
            holder_file.write_text(str(os.getpid()))
        yield
    finally:
        lock.release()


def holder_stat(holder_file: Path) -> tuple[int, list[str]]:
    """(pid, the words of /proc/PID/stat behind the name) of the holder. Raises OSError or ValueError."""
    pid = int(holder_file.read_text())
    return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_ticks(holder_file: Path) -> int:
    """CPU time that the holder has used, in clock ticks; 0 where that cannot be told."""
    try:
        _, words = holder_stat(holder_file)
        return int(words[11]) + int(words[12])
    except (OSError, ValueError, IndexError):
        return 0


def name_holder(holder_file: Path) -> str:
    """'process 123 (stopped)', as far as it can be told."""
    try:
        pid, words = holder_stat(holder_file)
    except (OSError, ValueError):
        return "another process"
    return f"process {pid}" + (" (stopped)" if words[0] in "Tt" else "")
