"""Runs a command and measures its time and, if asked, the memory of all its processes together."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.1


@dataclass(kw_only=True)
class Memory:
    """The most that was seen, in MB (10^6 bytes), and the number of samples.

    pss: of all processes together; a page that several processes share counts once. A page that processes outside share
    too counts in part. rss: of the largest single process, shared pages in full."""

    pss: float = 0.0
    rss: float = 0.0
    num_processes: int = 0
    num_samples: int = 0

    def sample(self, session: int) -> None:
        found = [kb for pid in processes_of(session) if (kb := kb_of(Path(f"/proc/{pid}/smaps_rollup")))]
        if found:
            self.num_samples += 1
            self.pss = max(self.pss, sum(kb["Pss"] for kb in found) * 1024 / 1e6)
            self.rss = max(self.rss, *(kb["Rss"] * 1024 / 1e6 for kb in found))
            self.num_processes = max(self.num_processes, len(found))


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command took, from start to exit, and what it printed."""

    seconds: float
    output: str
    memory: Memory


def processes_of(session: int) -> Iterator[int]:
    """Yields the processes of a session, also those whose parent has ended."""
    for name in os.listdir("/proc"):
        with suppress(OSError):  # it has ended
            if name.isdigit() and os.getsid(int(name)) == session:
                yield int(name)


def kb_of(file: Path) -> dict[str, int]:
    """Returns the lines 'Name: 12 kB' of a file in /proc; none of a process that has ended."""
    try:
        lines = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


@contextmanager
def bound(cores: set[int]) -> Iterator[None]:
    """Binds this thread, and so the processes that it starts meanwhile, to cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(command: list[str], *, cores: set[int], env: Mapping[str, str] | None = None, with_memory: bool = False) -> Ran:
    """Runs a command on these cores in a session of its own. Raises RuntimeError with its last lines if it fails.

    What earlier commands wrote is on the disk before it starts. Memory is sampled every SAMPLE_SECONDS.
    """
    os.sync()
    memory = Memory()
    with tempfile.TemporaryFile() as log:
        with bound(cores):
            start = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=os.sep, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            while with_memory and process.poll() is None:
                memory.sample(process.pid)
                time.sleep(SAMPLE_SECONDS)
            code = process.wait()
            seconds = time.perf_counter() - start
        finally:
            if process.poll() is None:  # this benchmark is stopped
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    if code:
        raise RuntimeError(f"{' '.join(command)} failed with {code}:\n{output[-4000:]}")
    return Ran(seconds=seconds, output=output, memory=memory)
