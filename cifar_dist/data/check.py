"""Checks pictures: a picture is sound if DALI, as in training, decodes it to the upright pixels that Pillow gives.

DALI reads fewer kinds of files than Pillow and rotates some differently. A few files crash its process with a signal.
So the check runs DALI in a child process and restarts it after such a file.
"""

import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Generic, TypeVar

import numpy as np
from PIL import Image

from cifar_dist.cpus import num_cpus
from cifar_dist.errors import UserError

BATCH_SIZE = 256  # pictures
BATCH_BYTES = 12 << 20  # of files and pixels; a larger picture is a batch by itself
LIMIT_SECONDS = 120  # for the start of DALI, and for a batch
BROKEN = (EOFError, OSError)  # raised by a connection whose other end was closed


def decoder(encoded: Any, gpu: bool = False) -> Any:
    """Returns DALI's decoder. Training and the check share this definition, so that both decode alike."""
    from nvidia.dali import fn, types  # noqa: PLC0415 - the process that prepares data must not hold DALI

    # The fancy upsampling of colours is what the CPU's decoder does: without it the GPU's decodes to other pixels.
    more: dict[str, Any] = {"device": "mixed", "jpeg_fancy_upsampling": True} if gpu else {"device": "cpu"}
    return fn.decoders.image(encoded, output_type=types.RGB, **more)


def decode_pipeline(max_batch_size: int, num_threads: int) -> Any:
    """Returns a DALI pipeline from `images` (encoded bytes) to RGB pixels, on the CPU."""
    from nvidia.dali import Pipeline, fn, types  # noqa: PLC0415 - the process that prepares data must not hold DALI

    pipe = Pipeline(batch_size=max_batch_size, num_threads=num_threads, device_id=None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(decoder(fn.external_source(name="images", dtype=types.UINT8, ndim=1)))
    pipe.build()
    return pipe


T = TypeVar("T")


def pixels_sha256(pixels: np.ndarray) -> bytes:
    """Returns the SHA-256 of a picture, uint8 [H, W, 3]: of H and W as little-endian uint32, then of the bytes."""
    digest = hashlib.sha256(struct.pack("<II", *pixels.shape[:2]))
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


@dataclass(frozen=True)
class Picture(Generic[T]):
    """A file's bytes `encoded`, its (height, width), and the pixels_sha256 that it must decode to. None: no check."""

    encoded: bytes
    shape: tuple[int, int]
    digest: bytes | None
    owner: T

    @property
    def num_bytes(self) -> int:
        return len(self.encoded) + (0 if self.digest is None else 3 * self.shape[0] * self.shape[1])


def batches(pictures: Iterable[Picture[T]]) -> Iterator[list[Picture[T]]]:
    """Groups the pictures, in order, into batches of at most BATCH_SIZE pictures and about BATCH_BYTES."""
    batch: list[Picture[T]] = []
    num_bytes = 0
    for picture in pictures:
        if batch and (len(batch) == BATCH_SIZE or num_bytes + picture.num_bytes > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(picture)
        num_bytes += picture.num_bytes
    if batch:
        yield batch


class Checker:
    """Asks a child process whether DALI decodes pictures correctly. The first request starts the child.

    `num_threads`: of DALI, by default one for each CPU. `module`: the module of the function `serve` that the child
    runs.
    """

    def __init__(self, num_threads: int | None = None, module: str = __name__) -> None:
        self.module, self.num_threads = module, num_threads or num_cpus()
        self._connection: Connection | None = None
        self._end: Callable[[], Any] = lambda: None
        self._asking = False

    def stop(self) -> None:
        """Ends the child. The next request starts a new child."""
        self._connection, self._asking = None, False
        self._end()

    def checked(self, pictures: Iterable[Picture[T]]) -> Iterator[tuple[Picture[T], bool]]:
        """Yields the pictures in order, each with whether it is sound. DALI decodes while the next batch is made."""
        waiting: list[Picture[T]] = []
        try:
            for batch in batches(pictures):
                answered = self._answers(waiting)
                self._ask(batch)
                waiting = batch
                yield from answered
            yield from self._answers(waiting)
        finally:
            if self._asking:  # the caller left early: the child's answer must not count for the next request
                self.stop()

    def _ask(self, batch: list[Picture[T]]) -> None:
        asked = [picture for picture in batch if picture.digest is not None]
        if not asked:
            return
        connection = self._connection or self._start()
        self._asking = True
        try:
            send(connection, asked)
        except BROKEN:
            self.stop()

    def _answers(self, batch: list[Picture[T]]) -> list[tuple[Picture[T], bool]]:
        asked = [picture for picture in batch if picture.digest is not None]
        sound = self._receive(len(asked)) if asked else b""
        if sound is None:  # a picture has crashed the child: check each picture alone to find it
            self.stop()
            sound = bytes(self._alone(picture) for picture in asked)
        answers = iter(sound)
        return [(picture, picture.digest is None or bool(next(answers))) for picture in batch]

    def _alone(self, picture: Picture[T]) -> bool:
        is_new = self._connection is None
        self._ask([picture])
        sound = self._receive(1)
        if sound is None:
            self.stop()
            if not is_new:  # an earlier picture may have damaged the child, so try in a new child
                return self._alone(picture)
        return sound == b"\1"

    def _receive(self, num_pictures: int) -> bytes | None:
        """Returns a byte for each picture of the last request, or None if the child has died or hangs."""
        connection, self._asking = self._connection, False
        try:
            answer = connection.recv_bytes() if connection and connection.poll(LIMIT_SECONDS) else b""
        except BROKEN:
            return None
        return answer if len(answer) == num_pictures else None

    def _start(self) -> Connection:
        """Starts the child and waits until it has decoded a picture. Raises UserError if that fails."""
        own_end, far_end = Pipe()
        output = tempfile.TemporaryFile()  # noqa: SIM115 - end_child closes it
        # A new interpreter with the parent's search path, but without the parent's threads and state.
        program = f"import sys; sys.path[:] = {sys.path!r}; from {self.module} import serve; "
        program += f"serve({far_end.fileno()}, {self.num_threads})"
        with far_end:
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[far_end.fileno()], **options)
        self._connection, self._end = own_end, weakref.finalize(self, end_child, process, own_end, output)
        if self._receive(1) != b"\1":
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines() or ["it ended without a message"]
            self.stop()
            raise UserError(
                f"DALI, which decodes images in training, does not run on this machine ({said[-1]}); "
                "install the project's packages again"
            )
        return own_end


def end_child(process: subprocess.Popen, connection: Connection, output: IO[bytes]) -> None:
    process.kill()
    process.wait()
    connection.close()
    output.close()


def send(connection: Connection, pictures: list[Picture[Any]]) -> None:
    """Sends shapes and digests of all pictures, then the files."""
    wanted = [[*picture.shape, picture.digest.hex()] for picture in pictures if picture.digest is not None]
    connection.send_bytes(json.dumps(wanted).encode())
    for picture in pictures:
        connection.send_bytes(picture.encoded)


def receive(connection: Connection) -> list[Picture[None]]:
    """Receives the pictures of a `send`. Raises EOFError if the other end was closed."""
    return [
        Picture(connection.recv_bytes(), (height, width), bytes.fromhex(digest), None)
        for height, width, digest in json.loads(connection.recv_bytes())
    ]


def serve(descriptor: int, num_threads: int) -> None:
    """Runs the child: answers each list of pictures with a byte per picture, 1 if sound, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and closes the connection
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump if a file crashes DALI
    decode = Decoder(num_threads)
    connection = Connection(descriptor)
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(file, "JPEG")
    white = pixels_sha256(np.full((8, 8, 3), 255, np.uint8))
    connection.send_bytes(decode.sound([Picture(file.getvalue(), (8, 8), white, None)]))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides the decoder libraries' remarks on odd files
    while True:
        try:
            pictures = receive(connection)
        except BROKEN:
            return
        connection.send_bytes(decode.sound(pictures))


class Decoder:
    """Decodes with DALI in this process."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self.pipe = decode_pipeline(BATCH_SIZE, self.num_threads)

    def sound(self, pictures: list[Picture[None]]) -> bytes:
        """Returns a byte per picture: 1 if DALI decodes it to its pixels.

        One bad picture fails its whole batch, so the pictures of a failed batch are then decoded one by one."""
        self.pipe.feed_input("images", [np.frombuffer(picture.encoded, np.uint8) for picture in pictures])
        try:
            (decoded,) = self.pipe.run()
            return bytes(pixels_sha256(decoded.at(i)) == picture.digest for i, picture in enumerate(pictures))
        except RuntimeError:
            self.pipe = decode_pipeline(BATCH_SIZE, self.num_threads)  # a failed pipeline cannot run again
            return b"\0" if len(pictures) == 1 else b"".join(self.sound([picture]) for picture in pictures)
