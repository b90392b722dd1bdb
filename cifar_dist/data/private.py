"""Folders and files on a node that only this user can write, so that their content can be trusted.

The processes of a node make each file once."""

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_dist.errors import UserError

WORD_SECONDS = 5.0  # longer waits for a lock are reported


def default_folder() -> str:
    """Returns the folder for temporary files. Raises UserError if none is writable."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"no folder for temporary files can be written to ({error}); set TMPDIR to one") from error


def user_folder(base: Path) -> Path:
    """Returns the folder BASE/cifar_dist-staged-UID, which only this user can read and write.

    Raises UserError if the path is a link or another user's folder, whose content may be forged.
    """
    path = base / f"cifar_dist-staged-{os.geteuid()}"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {base} for staged data: {error}; set --staging-folder") from error
    return private_folder(path)


def private_folder(path: Path) -> Path:
    """Returns the folder, created with mode 0700 if missing. Raises UserError like user_folder."""
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
    """Whether the path is a regular file of this user with a single name: no symbolic or hard link."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1


def keep_own(*paths: Path) -> None:
    """Removes the paths that are not regular files of this user. Removes links, not their targets."""
    for path in paths:
        if not is_own_file(path):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(
    path: Path, limit_seconds: float, say: Callable[[str], None], progress: Callable[[], object]
) -> Iterator[None]:
    """Holds the lock PATH.lock, and names the holding process in PATH.holder.

    Reports a longer wait. If for `limit_seconds` `progress()` does not change and the holder uses no CPU time, the
    holder is stopped or hangs. The caller then continues without the lock, so it must write under unique names.
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
    """Returns (pid, fields of /proc/PID/stat after the name) of the holder. Raises OSError or ValueError."""
    pid = int(holder_file.read_text())
    return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_ticks(holder_file: Path) -> int:
    """Returns the CPU time that the holder has used, in clock ticks, or 0 if unknown."""
    try:
        _, words = holder_stat(holder_file)
        return int(words[11]) + int(words[12])
    except (OSError, ValueError, IndexError):
        return 0


def name_holder(holder_file: Path) -> str:
    """Returns a text such as 'process 123 (stopped)', or 'another process' if the holder is unknown."""
    try:
        pid, words = holder_stat(holder_file)
    except (OSError, ValueError):
        return "another process"
    return f"process {pid}" + (" (stopped)" if words[0] in "Tt" else "")


@dataclass(frozen=True, kw_only=True)
class Staging:
    """How and where a job stages data. `folder` None means the temporary folder.

    Processes with the same `job` check a file once; with `job` '' each process checks it. `say` reports waits for
    another process. Such a wait ends `limit_seconds` after the other process's last progress.
    """

    job: str = ""
    folder: Path | str | None = None
    say: Callable[[str], None] | None = None  # print
    limit_seconds: float = 120.0


def once_per_node(
    path: Path, make: Callable[[Path], object], is_right: Callable[[Path], bool], staging: Staging | None = None
) -> Path:
    """Lets one process per node make a file in a private folder, and returns its path.

    `make` writes to a temporary name, which is renamed when complete. An existing file is used if `is_right` accepts
    it. NAME.sha256 records which job has accepted the file, and the file's identity then. Other processes of the job
    then skip the check, which reads gigabytes.
    """
    staging = staging or Staging()
    seen, part = path.with_name(path.name + ".sha256"), path.with_name(f"{path.name}.part-{os.getpid()}")

    def progress() -> list[int]:
        return [file.lstat().st_size for file in sorted(path.parent.glob(f"{path.name}.part-*"))]

    try:
        with one_at_a_time(path, staging.limit_seconds, staging.say or print, progress):
            keep_own(path, seen, part)
            known = seen.read_bytes() if seen.exists() else b""
            if path.exists():
                if staging.job and known == f"{staging.job} {identity(path)}".encode():
                    return path
                there = is_right(path)
            else:
                there = False
            if not there:
                remove_parts(path)
                try:
                    make(part)
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)
            seen.write_text(f"{staging.job} {identity(path)}")
            time.sleep(0.02)  # file times advance every few ms: a later write must get another time
    except OSError as error:
        free = shutil.disk_usage(path.parent).free >> 20 if path.parent.exists() else 0
        raise UserError(
            f"cannot stage {path} on this node: {error} ({free} MiB free); make room or set --staging-folder"
        ) from error
    return path


def need_room(path: Path, num_bytes: int, what: str, advice: str = "set --staging-folder") -> None:
    """Raises UserError if the disk at a path has less room than `num_bytes`, so that a long copy does not fail late."""
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise UserError(
            f"{what} needs {num_bytes / 2**30:,.2f} GiB on this node, and {path.parent} has {free / 2**30:,.2f} GiB "
            f"free; make room, or {advice}"
        )


def remove_parts(path: Path) -> None:
    """Removes incomplete files of processes that no longer exist."""
    for part in path.parent.glob(f"{path.name}.part-*"):
        pid = re.search(r"\.part-(\d+)", part.name)
        if not pid or not Path(f"/proc/{pid[1]}").exists():
            part.unlink(missing_ok=True)


def identity(path: Path) -> str:
    """Returns a fingerprint that changes when the file is written or the machine reboots, as a crash loses writes."""
    boot, info = Path("/proc/sys/kernel/random/boot_id"), path.stat()
    start = boot.read_text().strip() if boot.exists() else uuid.uuid4().hex  # unknown: a new value each time
    return f"{start} {info.st_dev} {info.st_ino} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
