"""Files of a source: below a folder or URI. archives.py has those in an archive."""

import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from pyarrow import fs

from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

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
    """Where files are. Other processes get a copy, so it holds no open file."""

    @property
    def is_shared(self) -> bool:
        """Whether other machines see the same files."""

    def files(self) -> Files: ...

    def below(self, prefix: str) -> "Tree":
        """Returns the tree of the files whose names begin with the prefix 'FOLDER/'."""

    def where(self, name: str, at: int = 0) -> str:
        """Names a file in messages."""

    def read(self, name: str, size: int, at: int) -> bytes:
        """Returns a file's content. Raises UserError."""

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        """Returns a file to read at any place. Raises UserError."""


@dataclass(frozen=True, kw_only=True)
class FolderTree:
    """The files below a folder. `only`: its one file that counts."""

    uri: str
    only: str = ""

    @property
    def is_shared(self) -> bool:
        return True

    def files(self) -> Files:
        if self.only:
            folder = folder_at(self.uri)
            info = folder.tried("look at", self.only, lambda: folder.fs.get_file_info(folder.at(self.only)))
            return Files.of({self.only: (info.size, info.mtime_ns or 0, 0)})
        return Files.of(dict(local_files(self.uri) if "://" not in self.uri else remote_files(self.uri)))

    def below(self, prefix: str) -> "FolderTree":
        return FolderTree(uri=join_uri(self.uri, prefix.rstrip("/")))

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        return join_uri(self.uri, name)

    def read(self, name: str, size: int, at: int) -> bytes:  # noqa: ARG002
        if "://" not in self.uri:
            try:
                return Path(self.uri, name).read_bytes()
            except OSError as error:
                raise UserError(f"{self.where(name)} cannot be read: {error.strerror}") from error
        try:
            return folder_at(self.uri).read(name)
        except FileNotFoundError as error:
            raise UserError(f"{self.where(name)} is gone") from error

    def open(self, name: str, size: int, at: int) -> Any:  # noqa: ARG002
        folder = folder_at(self.uri)
        with named(self.where(name)):
            return folder.fs.open_input_file(folder.at(name))


@functools.lru_cache(maxsize=4)
def folder_at(uri: str) -> Folder:
    """Returns the folder at a URI, connected once per process."""
    return Folder(uri, retry_seconds=60)


def local_files(root: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields (name, (size, time of change, 0)) of the files below a folder, through links but for loops."""
    folders = [(root, frozenset[tuple[int, int]]())]
    while folders:
        folder, above = folders.pop()
        try:
            info = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error
        inner = above | {(info.st_dev, info.st_ino)}
        if not entries and folder != root:
            yield folder[len(root) :].lstrip("/") + "/", (0, 0, 0)
        for entry in entries:
            name = entry.path[len(root) :].lstrip("/")
            try:
                info = entry.stat()
            except OSError:
                yield name, (GONE, 0, 0)
                continue
            if stat.S_ISDIR(info.st_mode):
                if (info.st_dev, info.st_ino) in inner:
                    raise UserError(f"{entry.path} is a link to a folder above it; remove it")
                folders.append((entry.path, inner))
            else:
                is_file = stat.S_ISREG(info.st_mode)  # no pipe, which nobody may write to
                yield name, (info.st_size if is_file else GONE, info.st_mtime_ns, 0)


def remote_files(uri: str) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yields like local_files what lies below a URI."""
    folder = Folder(uri, retry_seconds=60)
    selector = fs.FileSelector(folder.path, recursive=True)
    start = len(folder.path.rstrip("/")) + 1
    for info in folder.tried("list", "", lambda: folder.fs.get_file_info(selector)):
        if info.type == fs.FileType.File:
            yield info.path[start:], (info.size, info.mtime_ns or 0, 0)


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Turns an OSError into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{where} cannot be read: {first_line(error)}") from error
