"""Plants the faults of mutants.toml in copies of the source, one at a time, and sees whether the named test fails.

A row has `wrong` (what is wrong, in words), `file`, `text` (stands once in the file), `fault` (what it becomes), `test`
(the node id of the test that must fail) and, where no test can see the fault, `survives` (why).

Exit code 0: all named tests pass without a fault, and the rows with a reason survive, no others. --help has the usage.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("cifar_dist", "jobs", "tests", "benchmarks")
LIMIT_SECONDS = 300
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
CAUGHT, SURVIVED = "caught", "SURVIVED"  # any other outcome is a mistake of the table


class Mutant(NamedTuple):
    area: str
    wrong: str
    file: str
    text: str
    fault: str
    test: str
    survives: str = ""


def read_table() -> list[Mutant]:
    areas = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return [Mutant(area, **row) for area, rows in areas.items() for row in rows]


@contextmanager
def copied(mutant: Mutant | None = None) -> Iterator[Path]:
    """A copy of the source for a while, with the fault in it."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        for name in FOLDERS:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant:
            file = Path(folder) / mutant.file
            file.write_text(file.read_text().replace(mutant.text, mutant.fault))
        yield Path(folder)


def run_python(folder: Path, *args: str, limit_seconds: float = LIMIT_SECONDS) -> tuple[int | None, str]:
    """(exit code, None after the limit; output) of Python on the package in `folder`, also in processes it starts."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, *args]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


def outcome(code: int | None, output: str, test: str) -> str:
    """What a run of the named test says. Exit code 1 alone may also be an error before the test."""
    if code == 0:
        return SURVIVED
    failed = re.search(rf"^FAILED {re.escape(test)}(\W|$)", output, re.MULTILINE)
    if code == 1 and failed and not re.search("^ERROR ", output, re.MULTILINE):
        return CAUGHT
    return f"NO ANSWER: the test took more than {LIMIT_SECONDS} s" if code is None else f"NO ANSWER:\n{output}"


def run_mutant(mutant: Mutant) -> str:
    start = time.monotonic()
    with copied(mutant) as folder:
        found = outcome(*run_python(folder, *PYTEST, "-x", mutant.test), mutant.test)
    print(f"{time.monotonic() - start:5.1f} s  {mutant.area}: {mutant.wrong}: {found}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only rows with this text in area, wrong, file or test")
    parser.add_argument("--jobs", type=int, default=2, help="faults that are tried at the same time")
    args = parser.parse_args()
    mutants = [m for m in read_table() if args.only in " ".join((m.area, m.wrong, m.file, m.test))]
    if not mutants:
        parser.error(f"no row of the table has {args.only!r} in it")
    tests = sorted({m.test for m in mutants})
    with copied() as folder:
        code, output = run_python(folder, *PYTEST, f"-n{args.jobs}", "--dist=loadgroup", *tests, limit_seconds=3600)
    print(f"the {len(tests)} named tests pass without a fault" if code == 0 else output, flush=True)
    if code != 0:
        return 1
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(mutants, pool.map(run_mutant, mutants), strict=True))
    survivors = [m for m in mutants if found[m] == SURVIVED]
    num_caught = sum(answer == CAUGHT for answer in found.values())
    print(f"{len(mutants)} planted, {num_caught} caught, {len(survivors)} survived")
    for m in survivors:
        print(f"survived: {m.area}: {m.wrong} ({m.survives or 'NO REASON GIVEN'})")
    return int(any(found[m] != (SURVIVED if m.survives else CAUGHT) for m in mutants))


if __name__ == "__main__":
    sys.exit(main())
