"""Files of a source in a zip archive, read where they lie."""

import functools
import io
import lzma
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import BinaryIO

import pyarrow as pa

from cifar_dist.data.sources.trees import START, Files, named, need_small, plain_name, with_empty_folders
from cifar_dist.errors import UserError, first_line
from cifar_dist.uris import open_uri

ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the start of a zip archive, and of an empty one
FAULTS = zipfile.BadZipFile, NotImplementedError, IndexError, ValueError, pa.ArrowException  # of a damaged zip archive
SMALL = 1 << 16  # bytes of a zip archive


@dataclass(frozen=True, kw_only=True)
class ZipTree:
    """The files of a zip archive below `root`, a name with '/' at its end or ''. version: its size and time."""

    uri: str
    version: str
    root: str = ""

    @property
    def is_shared(self) -> bool:
        return True

    @property
    def reads_ahead(self) -> bool:
        return False  # its one open file has one position

    def files(self) -> Files:
        archive, _ = members(self.uri, self.version)
        found: dict[str, tuple[int, int, int]] = {}
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise UserError(f"{self.uri} is encrypted; unpack it, and name the folder")
            name = plain_name(info.filename)
            if name in found:
                raise UserError(f"{self.uri} holds two files named {name}; make it again with one of them")
            if not name.endswith("/"):
                found[name] = (info.file_size, info.CRC, info.header_offset)
        folders = [plain_name(name) for name in archive.namelist() if name.endswith("/")]
        return Files.of(with_empty_folders(found, folders)).below(self.root)

    def below(self, prefix: str) -> "ZipTree":
        return replace(self, root=self.root + prefix)

    def where(self, name: str, at: int = 0) -> str:  # noqa: ARG002
        return f"{self.uri}: {self.root}{name}"

    def read(self, name: str, size: int, at: int) -> bytes:
        need_small(self.where(name), size)
        content = self._first(name, size + 1, at)  # not all that a forged archive may unpack to
        if len(content) != size:
            raise UserError(f"{self.where(name)} has another size than the archive says")
        return content

    def start(self, name: str, size: int, at: int) -> bytes:  # noqa: ARG002
        return self._first(name, START, at)

    def open(self, name: str, size: int, at: int) -> BinaryIO:
        """Holds the file in memory: only its end says whether its checksum is right."""
        return io.BytesIO(self.read(name, size, at))

    def _first(self, name: str, num_bytes: int, at: int) -> bytes:
        archive, infos = members(self.uri, self.version)
        try:
            with archive.open(infos[at]) as file:
                return file.read(num_bytes)
        except (*FAULTS, zlib.error, lzma.LZMAError, RuntimeError, OSError, EOFError) as error:
            raise UserError(f"{self.where(name)} cannot be unpacked: {first_line(error)}") from error


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
