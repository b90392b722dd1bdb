"""Files of a source: below a folder or URI. archives.py has those in an archive."""

import contextlib
import functools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote

import numpy as np
from pyarrow import fs

from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

MOST_BYTES = (1 << 31) - 1  # of a picture: a Parquet column of the type `binary` holds no more
MOST_VISITS = 100  # of a folder through links: they can lead through few folders in millions of ways
START = 512  # bytes that tell what a file is
PLAIN = "/!$&'()*+,;=:@~"  # signs that a URI holds as they are
GONE = -1  # as a file's size: it cannot be read, for example a broken link


@dataclass(frozen=True, kw_only=True)
class Files:
    """Files of a tree, sorted by name, and its empty folders, whose names end with '/'.

    sizes: bytes; changed: time or checksum; at: first byte in an archive. int64 [n] each."""

    names: list[str]
    sizes: np.ndarray
    changed: np.ndarray
    at: np.ndarray

    @staticmethod
    def of(found: dict[str, tuple[int, int, int]]) -> "Files":
        """`found`: (size, changed, at) by name."""
        names = sorted(found)
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise UserError(f"{name!r} is a name that is not UTF-8; rename it") from None
        numbers = np.array([found[name] for name in names], np.int64).reshape(len(names), 3)
        return Files(names=names, sizes=numbers[:, 0], changed=numbers[:, 1], at=numbers[:, 2])

    def below(self, prefix: str) -> "Files":
        """Returns the files whose names begin with the prefix, named without it."""
        chosen = [i for i, name in enumerate(self.names) if name.startswith(prefix)]
        names = [self.names[i][len(prefix) :] for i in chosen]
        return Files(names=names, sizes=self.sizes[chosen], changed=self.changed[chosen], at=self.at[chosen])


class Tree(Protocol):
    """Where files are. Other processes get a copy, so it holds no open file. Its repr says which files these are."""

    @property
    def is_shared(self) -> bool:
        """Whether other machines see the same files."""

    @property
    def reads_ahead(self) -> bool:
        """Whether reads are slow, and threads may call them."""

    def files(self) -> Files: ...

    def below(self, prefix: str) -> "Tree":
        """Returns the tree of the files whose names begin with the prefix 'FOLDER/'."""

    def where(self, name: str, at: int = 0) -> str:
        """Names a file in messages."""

    def read(self, name: str, size: int, at: int) -> bytes:
        """Returns the content of a file of at most MOST_BYTES. Raises UserError."""

    def start(self, name: str, size: int, at: int) -> bytes:
        """Returns the first START bytes, without reading the whole file. Raises UserError."""

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        """Returns a file to read at any place. Raises UserError."""


def need_small(where: str, size: int) -> None:
    if size > MOST_BYTES:
        raise UserError(f"{where} has {size} bytes; files of up to 2 GiB are read here")


@dataclass(frozen=True, kw_only=True)
class FolderTree:
    """The files of the folder at a URI below `root`, a plain name with '/' at its end or ''. only: its one file."""

    uri: str
    root: str = ""
    only: str = ""

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def reads_ahead(self) -> bool:
        return not folder_at(self.uri).is_local

    def files(self) -> Files:
        folder = folder_at(self.uri)
        top = folder.at(self.root).rstrip("/") or "/"
        if self.only:
            info = folder.tried("look at", self.only, lambda: folder.fs.get_file_info(folder.at(self.only)))
            changed = local_change(os.stat(info.path)) if folder.is_local else info.mtime_ns or 0
            return Files.of({self.only: (info.size, changed, 0)})
        return Files.of(dict(local_files(top) if folder.is_local else remote_files(folder, top)))

    def below(self, prefix: str) -> "FolderTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        name = self.root + name
        return join_uri(self.uri, quote(name, safe=PLAIN) if "://" in self.uri else name)

    def read(self, name: str, size: int, at: int) -> bytes:  # noqa: ARG002
        need_small(self.where(name), size)
        content = self._first(name, size + 1)
        if len(content) != size:
            raise UserError(f"{self.where(name)} has changed while it was read; run the same command again")
        return content

    def start(self, name: str, size: int, at: int) -> bytes:  # noqa: ARG002
        return self._first(name, START)

    def _first(self, name: str, num_bytes: int) -> bytes:
        folder, name = folder_at(self.uri), self.root + name
        try:
            if folder.is_local:
                with open(folder.at(name), "rb", buffering=0) as file:
                    return file.read(num_bytes)
            return folder.tried("read", name, lambda: folder.fs.open_input_file(folder.at(name)).read(num_bytes))
        except OSError as error:
            where = self.where(name[len(self.root) :])
            raise UserError(f"{where} cannot be read: {error.strerror or first_line(error)}") from error

    def open(self, name: str, size: int, at: int) -> Any:  # noqa: ARG002
        folder = folder_at(self.uri)
        with named(self.where(name)):
            return folder.fs.open_input_file(folder.at(self.root + name))


@functools.lru_cache(maxsize=4)
def folder_at(uri: str) -> Folder:
    """Returns the folder at a URI, connected once per process."""
    return Folder(uri, retry_seconds=60)


def local_change(info: os.stat_result) -> int:
    """Returns a number of a file's times. A copy may keep the time of its content, but not the other one."""
    return (info.st_mtime_ns * 31 + info.st_ctime_ns) % (1 << 62)


def version_of(uri: str) -> str:
    """Returns a text that differs after the file at a URI was replaced."""
    folder = Folder(uri, retry_seconds=60)
    info = folder.tried("look at", "", lambda: folder.fs.get_file_info(folder.path))
    return f"{info.size} {local_change(os.stat(folder.path)) if folder.is_local else info.mtime_ns}"


def local_files(root: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields (name, (size, time of change, 0)) of the files below a folder, through links but for loops."""
    folders = [(root, frozenset[tuple[int, int]]())]
    visits = Counter[tuple[int, int]]()
    start = len(root.rstrip("/")) + 1
    while folders:
        folder, above = folders.pop()
        try:
            info = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
        here = info.st_dev, info.st_ino
        visits[here] += 1
        if visits[here] > MOST_VISITS:
            real = os.path.realpath(folder)
            raise UserError(f"more than {MOST_VISITS} links lead to the folder {real}, such as {folder}; remove them")
        if not entries and folder != root:
            yield folder[start:] + "/", (0, 0, 0)
        for entry in entries:
            name = entry.path[start:]
            try:
                info = entry.stat()
            except OSError:
                yield name, (GONE, 0, 0)
                continue
            if stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in above | {here}:
                    raise UserError(f"{entry.path} is a link to a folder above it; remove it")
                folders.append((entry.path, above | {here}))
            else:
                is_file = stat.S_ISREG(info.st_mode)  # no pipe, which nobody may write to
                yield name, (info.st_size if is_file else GONE, local_change(info), 0)


def remote_files(folder: Folder, top: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields like local_files what lies below `top`, a path in a folder's file system."""
    selector = fs.FileSelector(top, recursive=True)
    start = len(top.rstrip("/")) + 1
    for info in folder.tried("list", "", lambda: folder.fs.get_file_info(selector)):
        if info.type == fs.FileType.File:
            yield info.path[start:], (info.size, info.mtime_ns or 0, 0)


def plain_name(name: str) -> str:
    return name.removeprefix("./")


def with_empty_folders(found: dict[str, tuple[int, int, int]], folders: list[str]) -> dict[str, tuple[int, int, int]]:
    """Adds the folders FOLDER/ in which no file is found, as the tree of a folder has them."""
    full = {name[: i + 1] for name in [*found, *folders] for i, sign in enumerate(name[:-1]) if sign == "/"}
    return found | {name: (0, 0, 0) for name in folders if name not in full and name.strip("./")}


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
