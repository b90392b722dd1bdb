"""Files of a source in a zip or tar archive. They are read where they lie; only a compressed tar is unpacked."""

import bz2
import functools
import gzip
import io
import lzma
import os
import posixpath
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import fs

from cifar_dist.data.sources.trees import GONE, Files, FolderTree, Tree, named
from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri, open_uri, split_uri

ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the start of a zip archive, and of an empty one
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
OTHERS = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "RAR", b"\x28\xb5\x2f\xfd": "zstd"}
FAULTS = zipfile.BadZipFile, NotImplementedError, IndexError, ValueError, pa.ArrowException  # of a damaged zip archive
SMALL = 1 << 16  # bytes of a zip archive
BLOCK = 512  # bytes: members of a tar begin at multiples; two blocks of zeros end it


def open_tree(path: str) -> Tree:
    """Returns the tree of a folder, a file or an archive. Raises UserError if nothing is there."""
    uri = absolute_uri(path)
    filesystem, inner = open_uri(uri)
    info = Folder(uri).tried("look at", "", lambda: filesystem.get_file_info(inner))
    if info.type == fs.FileType.Directory:
        return FolderTree(uri=uri)
    if info.type != fs.FileType.File:
        raise UserError(f"{path} does not exist; --path names a folder, an archive or a URI")
    version = f"{info.size} {info.mtime_ns}"
    with named(uri), filesystem.open_input_stream(inner, compression=None) as file:
        start = file.read(BLOCK)
    if start.startswith(ZIP):
        return ZipTree(uri=uri, version=version)
    if start[257:262] == b"ustar":
        return TarTree(uri=uri, version=version)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic):
            return unpacked(uri, opener)
    if other := next((kind for magic, kind in OTHERS.items() if start.startswith(magic)), None):
        raise UserError(f"{path} is a {other} archive; zip and tar are read: unpack it, and name the folder")
    parent, name = split_uri(uri)
    return FolderTree(uri=parent, only=name)


@dataclass(frozen=True, kw_only=True)
class ZipTree:
    """The files of a zip archive below `root`, a name with '/' at its end or ''. version: its size and time."""

    uri: str
    version: str
    root: str = ""

    @property
    def is_shared(self) -> bool:
        return True

    def files(self) -> Files:
        archive, infos = members(self.uri, self.version)
        found = {}
        for info in infos.values():
            if info.flag_bits & 1:
                raise UserError(f"{self.uri} is encrypted; unpack it, and name the folder")
            found[plain_name(info.filename)] = (info.file_size, info.CRC, info.header_offset)
        folders = [plain_name(name) for name in archive.namelist() if name.endswith("/")]
        return Files.of(with_empty_folders(found, folders)).below(self.root)

    def below(self, prefix: str) -> "ZipTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        return f"{self.uri}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:
        archive, infos = members(self.uri, self.version)
        try:
            with archive.open(infos[at]) as file:
                content = file.read(size + 1)  # not all that a forged archive may unpack to
        except (*FAULTS, zlib.error, lzma.LZMAError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{self.where(name)} cannot be unpacked: {first_line(error)}") from error
        if len(content) != size:
            raise UserError(f"{self.where(name)} has another size than the archive says")
        return content

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        return io.BytesIO(self.read(name, size, at))


@functools.lru_cache(maxsize=2)
def members(uri: str, version: str) -> tuple[zipfile.ZipFile, dict[int, zipfile.ZipInfo]]:  # noqa: ARG001
    """Returns (the archive, its files by their place in it). Its directory is read once per process and version."""
    filesystem, path = open_uri(uri)
    try:
        with named(uri):
            file = filesystem.open_input_file(path)
            if file.size() < SMALL:  # zipfile tries places before its start, at which Arrow raises other errors
                file = io.BytesIO(file.read())
            archive = zipfile.ZipFile(file)
            infos = {info.header_offset: info for info in archive.infolist() if not info.filename.endswith("/")}
    except FAULTS as error:
        raise UserError(f"{uri} is no whole zip archive: {first_line(error)}; copy it again") from error
    if not all(info.filename for info in infos.values()):
        raise UserError(f"{uri} is no whole zip archive: it holds a file without a name; make it again")
    return archive, infos


def with_empty_folders(found: dict[str, tuple[int, int, int]], folders: list[str]) -> dict[str, tuple[int, int, int]]:
    """Adds the folders FOLDER/ in which no file is found, as the tree of a folder has them."""
    full = {name[: i + 1] for name in [*found, *folders] for i, sign in enumerate(name[:-1]) if sign == "/"}
    return found | {name: (0, 0, 0) for name in folders if name not in full and name.strip("./")}


def plain_name(name: str) -> str:
    return name.removeprefix("./")


@dataclass(frozen=True, kw_only=True)
class TarTree:
    """The files of a tar archive below `root`. version: its size and time. shown: its name in messages.

    is_temporary: unpacked by this job."""

    uri: str
    version: str
    root: str = ""
    shown: str = ""
    is_temporary: bool = False

    @property
    def is_shared(self) -> bool:
        return not self.is_temporary

    def files(self) -> Files:
        found: dict[str, tuple[int, int, int]] = {}
        file, where, end = tar_at(self.uri, self.version), self.shown or self.uri, 0
        links, folders = dict[str, str](), list[str]()
        file.seek(0)  # tarfile begins where the last reader has stopped
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    name, end = plain_name(member.name), member.offset_data
                    if member.isreg():
                        end += -(-member.size // BLOCK) * BLOCK
                        found[name] = (member.size, int(member.mtime), member.offset_data)
                    elif member.islnk() or member.issym():
                        folder = posixpath.dirname(name) if member.issym() else ""
                        links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
                    elif member.isdir():
                        folders.append(f"{name}/")
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps an object for each
            if file.read_at(2 * BLOCK, end) != bytes(2 * BLOCK):
                raise UserError(f"{where} is no whole tar archive: its end is missing; copy it again")
        except (tarfile.TarError, EOFError, OSError, pa.ArrowException) as error:
            raise UserError(f"{where} is no whole tar archive: {first_line(error)}; copy it again") from error
        for name, target in links.items():
            found[name] = found.get(target, (GONE, 0, 0))
        return Files.of(with_empty_folders(found, folders)).below(self.root)

    def below(self, prefix: str) -> "TarTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        return f"{self.shown or self.uri}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:
        with named(self.where(name)):
            content = tar_at(self.uri, self.version).read_at(size, at)
        if len(content) != size:
            raise UserError(f"{self.where(name)} ends too early: the archive is incomplete")
        return content

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        return io.BytesIO(self.read(name, size, at))


@functools.lru_cache(maxsize=2)
def tar_at(uri: str, version: str) -> Any:  # noqa: ARG001
    """Returns the open archive, opened once per process and version."""
    filesystem, path = open_uri(uri)
    with named(uri):
        return filesystem.open_input_file(path)


def tar_tree(uri: str) -> TarTree:
    """Returns the tree of a tar archive in a folder."""
    filesystem, path = open_uri(uri)
    info = filesystem.get_file_info(path)
    return TarTree(uri=uri, version=f"{info.size} {info.mtime_ns}")


def unpacked(uri: str, opener: Any) -> TarTree:
    """Returns the tree of a compressed tar archive, which is unpacked into a temporary tar file until the job ends."""
    filesystem, path = open_uri(uri)
    folder = temporary_folder()
    target = Path(folder, f"{len(os.listdir(folder))}.tar")
    try:
        with (
            filesystem.open_input_stream(path, compression=None) as source,
            opener(source) as content,
            open(target, "wb") as copy,
        ):
            shutil.copyfileobj(content, copy, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        free = shutil.disk_usage(folder).free >> 20
        raise UserError(
            f"{uri} cannot be unpacked to {folder} ({free} MiB free): {first_line(error)}; make room, set TMPDIR, or "
            "unpack it yourself and name the folder"
        ) from error
    if not tarfile.is_tarfile(target):
        raise UserError(f"{uri} is no tar archive; --path names a folder, or a zip or tar archive")
    return TarTree(uri=str(target), version="", shown=uri, is_temporary=True)


KEPT: dict[str, tempfile.TemporaryDirectory] = {}


def temporary_folder() -> str:
    """Returns a folder that goes when this process ends."""
    if "folder" not in KEPT:
        KEPT["folder"] = tempfile.TemporaryDirectory(prefix="cifar_dist-unpacked-")
    return KEPT["folder"].name
