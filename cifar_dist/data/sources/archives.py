"""Files of a source in a tar archive, read where they lie. zips.py reads zip, unpacking.py compressed tar archives."""

import functools
import io
import posixpath
import tarfile
import tempfile
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cifar_dist.data.sources.trees import (
    GONE,
    MOST_VISITS,
    START,
    Files,
    FolderTree,
    Tree,
    named,
    need_small,
    plain_name,
    version_of,
    with_empty_folders,
)
from cifar_dist.data.sources.unpacking import COMPRESSED, unpacked
from cifar_dist.data.sources.zips import ZIP, ZipTree
from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri, open_uri, split_uri

OTHERS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "RAR", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512  # bytes: members of a tar begin at multiples; blocks of zeros end it
LAST = "\U0010ffff"  # comes after all other signs
MOST_LINKS = 40  # that lead from one to the next
Places = dict[str, tuple[int, int, int]]  # (size, changed, at) by name


def open_tree(path: str) -> Tree:
    """Returns the tree of a folder, a file or an archive. Raises UserError if nothing is there."""
    uri = absolute_uri(path)
    filesystem, inner = open_uri(uri)
    info = Folder(uri).tried("look at", "", lambda: filesystem.get_file_info(inner))
    if info.type == fs.FileType.Directory:
        return FolderTree(uri=uri)
    if info.type != fs.FileType.File:
        raise UserError(f"{path} does not exist; --path names a folder, an archive or a URI")
    with named(uri), filesystem.open_input_stream(inner, compression=None) as file:
        start = file.read(BLOCK)
    if start.startswith(ZIP):
        return ZipTree(uri=uri, version=version_of(uri))
    if start[257:262] == b"ustar":
        return tar_tree(uri)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic):
            version = version_of(uri)
            return TarTree(uri=str(unpacked(uri, version, opener)), shown=uri, version=version, is_temporary=True)
    if other := next((kind for magic, kind in OTHERS.items() if start.startswith(magic)), None):
        raise UserError(f"{path} is a {other} archive; zip and tar are read: unpack it, and name the folder")
    parent, name = split_uri(uri)
    return FolderTree(uri=parent, only=name)


@dataclass(frozen=True, kw_only=True)
class TarTree:
    """The files of a tar archive below `root`. Its repr says which files these are, wherever they were unpacked.

    uri: what is read. shown: the archive that the user has named. version: its size and times.
    is_temporary: unpacked by this job."""

    uri: str = field(repr=False)
    shown: str
    version: str
    root: str = ""
    is_temporary: bool = field(default=False, repr=False)

    @property
    def is_shared(self) -> bool:
        return not self.is_temporary

    @property
    def reads_ahead(self) -> bool:
        return "://" in self.uri

    def files(self) -> Files:
        found, links, folders = Places(), dict[str, str](), list[str]()
        file, end = tar_at(self.uri, self.version), 0
        file.seek(0)  # tarfile begins where the last reader has stopped
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name, end = plain_name(member.name), member.offset_data
                    if member.isreg():
                        end += -(-member.size // BLOCK) * BLOCK
                        found[name] = (member.size, int(member.mtime), member.offset_data)
                        links.pop(name, None)  # of two members with one name the last one counts
                    elif member.islnk() or member.issym():
                        folder = posixpath.dirname(name) if member.issym() else ""
                        links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
                    elif member.isdir():
                        folders.append(f"{name}/")
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps an object for each
            check_end(file, end, self.shown)
        except (tarfile.TarError, EOFError, OSError, pa.ArrowException) as error:
            raise UserError(f"{self.shown} is no whole tar archive: {first_line(error)}; copy it again") from error
        found = with_linked(found, links, folders, self.shown)
        return Files.of(with_empty_folders(found, folders)).below(self.root)

    def below(self, prefix: str) -> "TarTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        return f"{self.shown}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:
        need_small(self.where(name), size)
        with named(self.where(name)):
            content = tar_at(self.uri, self.version).read_at(size, at)
        if len(content) != size:
            raise UserError(f"{self.where(name)} ends too early: the archive is incomplete")
        return content

    def start(self, name: str, size: int, at: int) -> bytes:
        return self.read(name, min(size, START), at)

    def open(self, name: str, size: int, at: int) -> Any:  # noqa: ARG002
        return io.BufferedReader(Stretch(tar_at(self.uri, self.version), at, size), 1 << 16)


class Stretch(io.RawIOBase):
    """A stretch of an open file, as a file of its own."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._file.read_at(max(0, min(len(buffer), self._size - self._at)), self._start + self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def check_end(file: Any, end: int, where: str) -> None:
    """Raises UserError unless the archive's last file is followed by zeros alone, a block of them or more."""
    size = file.size()
    if size - end < BLOCK or file.read_at(BLOCK, end) != bytes(BLOCK):
        raise UserError(f"{where} is no whole tar archive: its end is missing; copy it again")
    for start in range(end, size, 1 << 20):
        if any(file.read_at(min(1 << 20, size - start), start)):
            raise UserError(
                f"{where} holds data behind its end, perhaps a second archive; unpack it (tar --ignore-zeros), and "
                "name the folder"
            )


def with_linked(found: Places, links: dict[str, str], folders: list[str], where: str) -> Places:
    """Adds the files that links name, and those below linked folders. A link to nothing is a file that is GONE."""
    result, visits, empty = dict(found), Counter[str](), set(folders)
    sorted_names = sorted(found), sorted(links)
    waiting = list(links.items())
    while waiting:
        name, target = waiting.pop()
        target = end_of_links(target, links)
        if target in found:
            result[name] = found[target]
            continue
        prefix = "" if target == "." else f"{target}/"
        files, inner = (names[bisect_left(names, prefix) : bisect_left(names, prefix + LAST)] for names in sorted_names)
        if not files and not inner and prefix not in empty:
            result[name] = (GONE, 0, 0)
            continue
        if f"{name}/".startswith(prefix):
            raise UserError(f"{where}: {name} is a link to a folder above it; make the archive again without it")
        visits[target] += 1
        if visits[target] > MOST_VISITS:
            raise UserError(f"{where}: more than {MOST_VISITS} links lead to the folder {target}; make it again")
        result |= {f"{name}/{n[len(prefix) :]}": found[n] for n in files}
        waiting += [(f"{name}/{n[len(prefix) :]}", links[n]) for n in inner]
    return result


def end_of_links(path: str, links: dict[str, str]) -> str:
    """Returns where a path leads through links to files and folders; '' if it does not end."""
    for _ in range(MOST_LINKS):
        parts = path.split("/")
        heads = ("/".join(parts[:i]) for i in range(1, len(parts) + 1))
        head = next((head for head in heads if head in links), None)
        if head is None:
            return path
        path = posixpath.normpath(f"{links[head]}/{path[len(head) :].lstrip('/')}")
    return ""


@functools.lru_cache(maxsize=2)
def tar_at(uri: str, version: str) -> Any:  # noqa: ARG001
    """Returns the open archive, opened once per process and version."""
    filesystem, path = open_uri(uri)
    with named(uri):
        return filesystem.open_input_file(path)


def tar_tree(uri: str) -> TarTree:
    """Returns the tree of a tar archive in a folder."""
    return TarTree(uri=uri, shown=uri, version=version_of(uri))


KEPT: dict[str, tempfile.TemporaryDirectory] = {}


def temporary_folder() -> str:
    """Returns a folder that goes when this process ends."""
    if "folder" not in KEPT:
        KEPT["folder"] = tempfile.TemporaryDirectory(prefix="cifar_dist-unpacked-")
    return KEPT["folder"].name
