"""Compressed tar archives, unpacked into a file in the user's private folder, which goes when the job ends.

A job locks its file. So what a killed job has left is known: it is used, or else removed."""

import atexit
import bz2
import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import tarfile
import uuid
import zlib
from pathlib import Path
from typing import Any

from cifar_dist.data.private import default_folder, need_room, user_folder
from cifar_dist.errors import UserError, first_line
from cifar_dist.uris import open_uri

COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
PREFIX = "unpacked-"
HELD: dict[Path, int] = {}  # the locked files of this process


def unpacked(uri: str, version: str, opener: Any) -> Path:
    """Returns a compressed tar archive's content, a file that stays until this process ends. Raises UserError."""
    folder = user_folder(Path(default_folder()))
    path = folder / f"{PREFIX}{hashlib.sha256(f'{uri} {version}'.encode()).hexdigest()[:32]}.tar"
    if path in HELD and path.exists():
        return path
    if not hold(path):
        remove_leftovers(folder)
        part = path.with_name(f"{path.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            unpack(uri, opener, part)
            with contextlib.suppress(FileExistsError):  # another job was faster
                os.link(part, path)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            free = shutil.disk_usage(folder).free >> 20
            raise UserError(
                f"{uri} cannot be unpacked to {folder} ({free} MiB free): {first_line(error)}; make room, set TMPDIR, "
                "or unpack it yourself and name the folder"
            ) from error
        finally:
            let_go(part)
        if not hold(path):
            raise UserError(f"{path} is gone: another job has removed it; run the same command again")
    return path


def unpack(uri: str, opener: Any, part: Path) -> None:
    filesystem, inner = open_uri(uri)
    size = filesystem.get_file_info(inner).size
    least = size * 9 // 10  # what does not get smaller becomes a little larger
    if opener is gzip.open:
        with filesystem.open_input_file(inner) as file:
            least = max(least, *struct.unpack("<I", file.read_at(4, max(0, size - 4)).rjust(4, b"\0")))
    need_room(part, least, f"unpacking {uri}", advice="set TMPDIR, or unpack it yourself and name the folder")
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    HELD[part] = descriptor
    with (
        filesystem.open_input_stream(inner, compression=None) as source,
        opener(source) as content,
        os.fdopen(os.dup(descriptor), "wb") as copy,
    ):
        shutil.copyfileobj(content, copy, 1 << 20)
    if not tarfile.is_tarfile(part):
        raise UserError(f"{uri} is no tar archive; --path names a folder, or a zip or tar archive")


def hold(path: Path) -> bool:
    """Locks an own file, so that no other job removes it. Returns whether it is there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:  # a link
        raise UserError(f"{path} cannot be used ({error.strerror}); remove it") from error
    info = os.fstat(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    is_there = path.exists() and path.stat().st_ino == info.st_ino  # it may have been removed before it was locked
    if not (is_there and stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()):
        os.close(descriptor)
        return False
    HELD[path] = descriptor
    return True


def let_go(path: Path) -> None:
    """Unlocks a file of this process, and removes it if no other job holds it. A .part is of this process alone."""
    descriptor = HELD.pop(path, None)
    if descriptor is not None:
        if ".part-" in path.name:
            path.unlink(missing_ok=True)
        else:
            remove_if_idle(path, descriptor)
        os.close(descriptor)


def remove_if_idle(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # BlockingIOError: another job reads it
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.lstat().st_ino == os.fstat(descriptor).st_ino:
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Removes what killed jobs have left. Their locks went with them."""
    for path in folder.glob(f"{PREFIX}*"):
        if path not in HELD:
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                remove_if_idle(path, descriptor)
                os.close(descriptor)


@atexit.register
def let_all_go() -> None:
    for path in list(HELD):
        let_go(path)
