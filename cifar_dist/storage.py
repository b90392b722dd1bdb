"""Files under a URI, on any storage that pyarrow.fs opens: local paths, NFS, S3, and GCS, which was never tested."""

import contextlib
import errno
import hashlib
import io
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from cifar_dist.errors import UserError
from cifar_dist.uris import absolute_uri, join_uri, open_uri

Result = TypeVar("Result")

# Transient errors: an unreachable file server or network, an overloaded object store. Errors of pyarrow's file systems
# have an errno only if they come from the operating system.
PASSING_ERRNOS = {
    *(
        errno.ENOTEMPTY,
        errno.EIO,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
    ),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EREMOTEIO),
}
PASSING = re.compile(
    "NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING|DEADLINE_EXCEEDED|curlCode"
    r"|HTTP status (429|5\d\d)"
)
ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then run the same command to go on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check that this user may write there"),
}


def may_pass(error: OSError) -> bool:
    """Whether the same call may succeed a little later. A full disk or denied access needs a user."""
    return error.errno in PASSING_ERRNOS or bool(PASSING.search(str(error)))


class Folder:
    """A folder under a URI. Names are relative to the folder. Storage errors become UserErrors that name the file.

    After transient errors, operations are retried for `retry_seconds`, with growing waits.
    """

    def __init__(self, uri: str, retry_seconds: float = 0.0) -> None:
        self.uri, self.retry_seconds = absolute_uri(uri), retry_seconds
        self.fs, self.path = open_uri(uri)
        self.is_local = isinstance(self.fs, fs.LocalFileSystem)

    def at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def tried(self, verb: str, name: str, action: Callable[[], Result]) -> Result:
        """Runs the action and returns its result. Retries it after a transient OSError.

        Turns other OSErrors, except FileNotFoundError, into UserErrors."""
        end, wait = time.monotonic() + self.retry_seconds, 0.5
        while True:
            try:
                return action()
            except FileNotFoundError:
                raise
            except OSError as error:
                left, where = end - time.monotonic(), join_uri(self.uri, name)
                if not may_pass(error) or left <= 0:
                    advice = ADVICE.get(error.errno or 0) or (may_pass(error) and "run the same command again later")
                    raise UserError(f"cannot {verb} {where}: {error}" + (f"; {advice}" if advice else "")) from error
                print(f"cannot {verb} {where}: {error}; trying again", file=sys.stderr, flush=True)
                time.sleep(min(wait, left))
                wait = min(2 * wait, 10.0)

    def exists(self, name: str = "") -> bool:
        info = self.tried("look at", name, lambda: self.fs.get_file_info(self.at(name)))
        return info.type != fs.FileType.NotFound

    def is_link(self, name: str) -> bool:
        return self.is_local and os.path.islink(self.at(name))

    def names(self, name: str = "") -> list[str]:
        """Returns the sorted base names in the folder or its subfolder `name`, empty if that does not exist."""
        selector = fs.FileSelector(self.at(name), allow_not_found=True)

        def act() -> list[fs.FileInfo]:
            with contextlib.suppress(FileNotFoundError):  # another process changed the folder meanwhile: list it again
                return self.fs.get_file_info(selector)
            return self.fs.get_file_info(selector)

        return sorted({info.base_name for info in self.tried("list", name, act)} | self._broken_links(name))

    def _broken_links(self, name: str) -> set[str]:
        """Returns the names of broken links in a local folder, which pyarrow does not list."""
        if self.is_local:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return {e.name for e in os.scandir(self.at(name)) if e.is_symlink() and not os.path.exists(e.path)}
        return set()

    def folders(self) -> list[str]:
        """Returns the sorted base names of the subfolders."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self.tried("list", "", lambda: self.fs.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def create(self, name: str = "") -> None:
        self.tried("create", name, lambda: self.fs.create_dir(self.at(name), recursive=True))

    def read(self, name: str) -> bytes:
        """Returns the file's content. Raises FileNotFoundError if the file does not exist."""
        return self.tried("read", name, lambda: self.fs.open_input_stream(self.at(name)).read())

    def open(self, name: str) -> Any:
        """Returns a stream to read a file in parts. Raises FileNotFoundError if the file does not exist."""
        return self.tried("read", name, lambda: self.fs.open_input_stream(self.at(name)))

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file atomically: a reader sees the old or the new content.

        Object stores do so themselves. Local files are written and synced under a temporary name, then renamed."""

        def act() -> None:
            if not self.is_local:
                with self.fs.open_output_stream(self.at(name)) as stream:
                    stream.write(content)
                return
            temporary = Path(self.at(f"{name}.{uuid.uuid4().hex[:8]}.tmp"))
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.at(name))
                sync(temporary.parent)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

        self.tried("write", name, act)

    def move(self, name: str, new_name: str) -> None:
        self.tried("write", new_name, lambda: self.fs.move(self.at(name), self.at(new_name)))

    def delete(self, name: str) -> None:
        """Deletes a file, or a folder with its contents, if it exists. Deletes a link but not its target."""
        if self.is_link(name):
            return self.tried("delete", name, lambda: Path(self.at(name)).unlink(missing_ok=True))
        kind = self.tried("look at", name, lambda: self.fs.get_file_info(self.at(name))).type
        with contextlib.suppress(FileNotFoundError):  # another process deleted it meanwhile
            if kind == fs.FileType.Directory:
                self.tried("delete", name, lambda: self.fs.delete_dir(self.at(name)))
            elif kind == fs.FileType.File:
                self.tried("delete", name, lambda: self.fs.delete_file(self.at(name)))

    def delete_empty(self, name: str) -> None:
        """Deletes a folder only if it is empty: another process may put a file into it."""
        if self.is_local:
            with contextlib.suppress(OSError):
                Path(self.at(name)).rmdir()
        elif not self.names(name):
            self.delete(name)

    def download(self, name: str, target: Path) -> str:
        """Copies a file to a local path. Returns the SHA-256 of the copied bytes (hex)."""

        def act() -> str:
            digest = hashlib.sha256()
            with here(target):
                target.write_bytes(b"")
            with self.fs.open_input_stream(self.at(name)) as source, open(target, "wb", buffering=0) as copy:
                while chunk := source.read(1 << 22):
                    digest.update(chunk)
                    with here(target):
                        write_all(copy, chunk)
            return digest.hexdigest()

        return self.tried("copy", name, act)

    def upload(self, source: Path, name: str) -> None:
        """Copies a local file into the folder, not atomically: to publish it, write an index file last."""

        def act() -> None:
            with open(source, "rb") as stream, self.fs.open_output_stream(self.at(name)) as copy:
                while chunk := stream.read(1 << 22):
                    copy.write(chunk)

        self.tried("write", name, act)


def is_empty(uri: str) -> bool:
    """Whether a folder has no entries, for example because it was deleted or is not mounted."""
    return not os.path.isfile(uri) and not Folder(uri).names()


@contextlib.contextmanager
def here(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the local file `path`, to tell it from storage errors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} on this machine: {error}; make room in {path.parent}, or name another folder "
            "(TMPDIR; for staged data --staging-folder)"
        ) from error


def write_all(file: io.RawIOBase | io.FileIO, content: bytes) -> None:
    """Writes all content to an unbuffered file, whose write() may write only a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def sync(path: Path) -> None:
    """Syncs a local file or folder to disk, so that its content survives a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a local file (hex)."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
