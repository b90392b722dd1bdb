"""The fuzz test's child process: damages what the project stores, reads it as the jobs do and judges what comes of it.

    python tests/unit/fuzzing.py FOLDER GROUP SEED SECONDS [AREA:NUMBER]

FOLDER is empty; GROUP is a module fuzz_GROUP; SECONDS do not count the start.

It says which case begins before it begins, so that whoever started it knows which one has ended the process. The last
argument repeats one case.
"""

import contextlib
import faulthandler
import importlib
import io
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

PACKAGE = str(Path(__file__).parents[2] / "cifar_dist")
CASE_SECONDS = 60  # a hang; a case takes some ms
CASE_BYTES = 1 << 30  # of memory that a case may take
MOST_FAULTS = 10  # that are told apart, then it ends


class Fault(AssertionError):
    """An outcome that is none of: one sentence, an older state, the same content."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Fault(what)


def outcome(read: Callable[[], Any]) -> Any:
    """What is read, or the sentence of a UserError as a Refused."""
    from cifar_dist.errors import UserError

    try:
        return read()
    except UserError as error:
        require(len(str(error).splitlines()) == 1, f"not one line: {error}")
        return Refused(str(error))


class Refused(str):
    """A sentence."""


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder, links not followed: bytes, where a link leads, None for a folder."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): p.readlink() if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in found
    }


class Group:
    """Originals in FOLDER/original; each of `areas` damages a copy of them and judges the reading.

    outside: a folder that damage may lead to, which nothing may change.
    """

    areas: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder, self.original, self.outside = folder, folder / "original", folder / "outside"
        self.original.mkdir()
        self.outside.mkdir()
        (self.outside / "outside.txt").write_text("somebody's own")
        self.said = ""

    def run(self, area: str, random: Random) -> None:
        """One case, in a copy of its own. Raises Fault, or whatever the project should not have raised."""
        copy, before = self.folder / "copy", tree(self.outside)
        shutil.copytree(self.original, copy, symlinks=True)
        try:
            getattr(self, area)(random, copy)
            require(tree(self.outside) == before, "a file elsewhere was changed")
        finally:
            shutil.rmtree(copy)


def peak_bytes() -> int:
    """The most memory since the last `forget_peak`."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def run_case(group: Group, area: str, seed: int, number: int) -> None:
    """Raises what is wrong with the case."""
    group.said = ""
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    before = forget_peak()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            group.run(area, Random(f"{area}:{seed}:{number}"))
        taken = peak_bytes() - before
        require(taken < CASE_BYTES, f"took {taken >> 20} MiB of memory")
    finally:
        faulthandler.cancel_dump_traceback_later()


def place_of(error: BaseException) -> str:
    """Faults of one kind and place are one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(PACKAGE)] or frames
    return f"{type(error).__name__} {ours[-1].filename}:{ours[-1].lineno} {str(error)[:30] * isinstance(error, Fault)}"


def main(folder: str, group_name: str, seed: str, seconds: str, one: str = "") -> int:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    group: Group = importlib.import_module(f"fuzz_{group_name}").make(Path(folder))
    # The machine is not to suffer from a case that takes memory without end.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 30),) * 2)
    print(f"ready {group_name}", flush=True)
    faults, number, end = dict[str, str](), 0, time.monotonic() + float(seconds)
    while time.monotonic() < end and len(faults) < MOST_FAULTS:
        area = group.areas[number % len(group.areas)]
        if one:
            area, text = one.split(":")
            number = int(text)
        print(f"case {group_name}:{area}:{seed}:{number}", flush=True)
        try:
            run_case(group, area, int(seed), number)
        except Exception as error:
            text = f"{group_name}:{area}:{seed}:{number} {group.said}\n{traceback.format_exc(limit=-8)}"
            if faults.setdefault(place_of(error), text) is text:
                print(f"fault {text}", flush=True)
        if one:
            break
        number += 1
    print(f"done {number} cases, {len(faults)} faults", flush=True)
    return bool(faults)


if __name__ == "__main__":
    import fuzzing  # under the name by which the groups import it

    sys.exit(fuzzing.main(*sys.argv[1:]))
