"""A file that is written in parts and has its name once it is complete."""

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any

from cifar_dist.storage import Folder, sync


class NewFile:
    """A new file of a folder, to be written from start to end. Arrow's writers take it as a Python file.

    A local file has a temporary name until `finish`; object stores show a file once it is closed."""

    closed = False

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name, self._num_bytes = folder, name, 0
        self._digest = hashlib.sha256()
        self._temporary = Path(folder.at(f"{name}.{uuid.uuid4().hex[:8]}.tmp")) if folder.is_local else None
        self._stream: Any = folder.tried("write", name, self._open)

    def _open(self) -> Any:
        if self._temporary:
            return open(self._temporary, "wb")
        return self._folder.fs.open_output_stream(self._folder.at(self._name))

    def write(self, content: Any) -> int:
        self._folder.tried("write", self._name, lambda: self._stream.write(content))
        self._digest.update(content)
        self._num_bytes += len(content)
        return len(content)

    def flush(self) -> None: ...

    def finish(self) -> tuple[int, str]:
        """Gives the file its name. Returns (number of bytes, SHA-256 in hex)."""

        def act() -> None:
            if self._temporary:
                self._stream.flush()
                os.fsync(self._stream.fileno())
            self._stream.close()
            if self._temporary:
                self._temporary.replace(self._folder.at(self._name))
                sync(self._temporary.parent)

        self._folder.tried("write", self._name, act)
        return self._num_bytes, self._digest.hexdigest()

    def give_up(self) -> None:
        """Removes what was written."""
        try:
            self._stream.close()
        finally:
            if self._temporary:
                self._temporary.unlink(missing_ok=True)
            else:
                self._folder.delete(self._name)
