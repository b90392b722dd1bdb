"""Files under a URI, on anything that pyarrow.fs opens: local paths, NFS, S3, GCS."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from cifar_dist.errors import UserError

Result = TypeVar("Result")


def absolute_uri(uri: str) -> str:
    """The URI as it is, or a local path made absolute (workers run in another directory)."""
    if not uri:
        raise UserError("an empty path or URI was given; name a folder, or a URI such as s3://bucket/folder")
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def join_uri(uri: str, *parts: str) -> str:
    """Appends path parts, in front of a query such as ?region=..."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *filter(None, parts)]) + mark + query


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path inside it. Raises UserError for a URI that cannot be opened."""
    uri = absolute_uri(uri)
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    if urlsplit(uri).username is not None:
        raise UserError(
            f"the URI {uri.split('://')[0]}://... holds credentials; leave them out and set them in the "
            "environment (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    try:
        return fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot open the URI {uri}: {error}") from error


class Folder:
    """A folder under a URI. Paths are relative to it; storage faults become UserErrors that name the file."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute_uri(uri)
        self.fs, self.path = open_uri(uri)

    def at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def _try(self, verb: str, name: str, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"cannot {verb} {join_uri(self.uri, name)}: {error}") from error

    def exists(self, name: str = "") -> bool:
        info = self._try("look at", name, lambda: self.fs.get_file_info(self.at(name)))
        return info.type != fs.FileType.NotFound

    def names(self, name: str = "") -> list[str]:
        """Sorted base names in the folder or in one of its folders; empty if it is not there."""
        selector = fs.FileSelector(self.at(name), allow_not_found=True)
        return sorted(info.base_name for info in self._try("list", name, lambda: self.fs.get_file_info(selector)))

    def create(self, name: str = "") -> None:
        self._try("create", name, lambda: self.fs.create_dir(self.at(name), recursive=True))

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError if it is not there."""
        return self._try("read", name, lambda: self.fs.open_input_stream(self.at(name)).read())

    def write(self, name: str, content: bytes) -> None:
        """Under a temporary name, then renamed: a reader sees the old file or the new one, never a part."""

        def act() -> None:
            with self.fs.open_output_stream(self.at(name + ".tmp")) as stream:
                stream.write(content)
            self.fs.move(self.at(name + ".tmp"), self.at(name))

        self._try("write", name, act)

    def move(self, name: str, new_name: str) -> None:
        self._try("write", new_name, lambda: self.fs.move(self.at(name), self.at(new_name)))

    def delete(self, name: str) -> None:
        """Deletes a file or a folder with all that is in it; what is not there is fine."""
        kind = self._try("look at", name, lambda: self.fs.get_file_info(self.at(name))).type
        if kind == fs.FileType.Directory:
            self._try("delete", name, lambda: self.fs.delete_dir(self.at(name)))
        elif kind == fs.FileType.File:
            self._try("delete", name, lambda: self.fs.delete_file(self.at(name)))

    def download(self, name: str, target: Path) -> str:
        """Copies a file to a local path; returns the SHA-256 of what was copied (hex)."""

        def act() -> str:
            digest = hashlib.sha256()
            with self.fs.open_input_stream(self.at(name)) as source, open(target, "wb") as copy:
                while chunk := source.read(1 << 22):
                    digest.update(chunk)
                    copy.write(chunk)
            return digest.hexdigest()

        return self._try("copy", name, act)

    def upload(self, source: Path, name: str) -> None:
        """Copies a local file here, under its own name at once: publish it by writing an index file last."""

        def act() -> None:
            with open(source, "rb") as stream, self.fs.open_output_stream(self.at(name)) as copy:
                while chunk := stream.read(1 << 22):
                    copy.write(chunk)

        self._try("write", name, act)


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file (hex)."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Any) -> bytes:
    """Readable JSON with a fixed layout, so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
