"""Files of a source in a zip or tar archive. They are read where they lie; only a compressed tar is unpacked."""

import bz2
import functools
import gzip
import io
import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs

from cifar_dist.data.sources.trees import Files, FolderTree, Tree, named
from cifar_dist.errors import UserError, first_line
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri, open_uri, split_uri


def open_tree(path: str) -> Tree:
    """Returns the tree of a folder, a file or an archive. Raises UserError if nothing is there."""
    uri = absolute_uri(path)
    filesystem, inner = open_uri(uri)
    folder = Folder(uri)
    kind = folder.tried("look at", "", lambda: filesystem.get_file_info(inner)).type
    if kind == fs.FileType.Directory:
        return FolderTree(uri=uri)
    if kind != fs.FileType.File:
        raise UserError(f"{path} does not exist; --path names a folder, an archive or a URI")
    with named(uri), filesystem.open_input_file(inner) as file:
        start = file.read(512)
        file.seek(0)
        if zipfile.is_zipfile(file):
            return ZipTree(uri=uri)
    if start[257:262] == b"ustar":
        return TarTree(uri=uri)
    for magic, opener in COMPRESSED.items():
        if start.startswith(magic):
            return unpacked(uri, opener)
    parent, name = split_uri(uri)
    return FolderTree(uri=parent, only=name)


@dataclass(frozen=True, kw_only=True)
class ZipTree:
    """The files of a zip archive below `root`, a name with '/' at its end or ''."""

    uri: str
    root: str = ""

    @property
    def is_shared(self) -> bool:
        return True

    def files(self) -> Files:
        archive = zip_at(self.uri)
        found = {}
        for info in archive.infolist():
            if not info.is_dir():
                if info.flag_bits & 1:
                    raise UserError(f"{self.uri} is encrypted; unpack it, and name the folder")
                found[info.filename] = (info.file_size, info.CRC, info.header_offset)
        return Files.of(found).below(self.root)

    def below(self, prefix: str) -> "ZipTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str) -> str:
        return f"{self.uri}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:  # noqa: ARG002
        try:
            with zip_at(self.uri).open(self.root + name) as file:
                content = file.read(size + 1)  # not all that a forged archive may unpack to
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{self.where(name)} cannot be unpacked: {first_line(error)}") from error
        if len(content) != size:
            raise UserError(f"{self.where(name)} has another size than the archive says")
        return content

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        return io.BytesIO(self.read(name, size, at))


@functools.lru_cache(maxsize=2)
def zip_at(uri: str) -> zipfile.ZipFile:
    """Returns the archive at a URI, whose directory is read once per process."""
    filesystem, path = open_uri(uri)
    try:
        with named(uri):
            return zipfile.ZipFile(filesystem.open_input_file(path))
    except zipfile.BadZipFile as error:
        raise UserError(f"{uri} is no whole zip archive: {first_line(error)}; copy it again") from error


@dataclass(frozen=True, kw_only=True)
class TarTree:
    """The files of a tar archive below `root`. `shown`: its name in messages. `is_temporary`: unpacked by this job."""

    uri: str
    root: str = ""
    shown: str = ""
    is_temporary: bool = False

    @property
    def is_shared(self) -> bool:
        return not self.is_temporary

    def files(self) -> Files:
        found, file = {}, tar_at(self.uri)
        file.seek(0)  # tarfile begins where the last reader has stopped
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.isreg():
                        found[member.name.removeprefix("./")] = (member.size, int(member.mtime), member.offset_data)
                    archive.members = []  # type: ignore[attr-defined]  # else it keeps an object for each
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{self.shown or self.uri} is no whole tar archive: {first_line(error)}") from error
        return Files.of(found).below(self.root)

    def below(self, prefix: str) -> "TarTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str) -> str:
        return f"{self.shown or self.uri}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:
        with named(self.where(name)):
            content = tar_at(self.uri).read_at(size, at)
        if len(content) != size:
            raise UserError(f"{self.where(name)} ends too early: the archive is incomplete")
        return content

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        return io.BytesIO(self.read(name, size, at))


@functools.lru_cache(maxsize=2)
def tar_at(uri: str) -> Any:
    filesystem, path = open_uri(uri)
    with named(uri):
        return filesystem.open_input_file(path)


COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


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
    return TarTree(uri=str(target), shown=uri, is_temporary=True)


@functools.lru_cache(maxsize=1)
def temporary_folder() -> str:
    """Returns a folder that goes when this process ends."""
    return KEPT.setdefault("folder", tempfile.TemporaryDirectory(prefix="cifar_dist-unpacked-")).name


KEPT: dict[str, tempfile.TemporaryDirectory] = {}
