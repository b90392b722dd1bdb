"""The command line: `cifar-dist JOB`, `python -m cifar_dist JOB` and `python jobs/JOB.py` run the same jobs.

This module imports nothing slow, so that help and errors about options appear at once.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from cifar_dist import environment, stopping
from cifar_dist.errors import exit_code_of
from cifar_dist.options import nearest
from cifar_dist.versions import check_dali

# Each job and its summary, in the usual order of use.
JOBS = {
    "pipeline": "prepare a data set, train, evaluate and report, in one job",
    "prepare": "turn images into a data set",
    "weights": "fetch the published ImageNet weights of ResNet50V2",
    "train": "train a network on a data set",
    "evaluate": "evaluate trained runs and write a report",
}


def module_of(job: str) -> ModuleType:
    """Returns the job's module. It defines COMMAND, and `run`, which takes the parsed settings (Given)."""
    return importlib.import_module(f"cifar_dist.cli.{job}")


def run_job(job: str, words: list[str] | None = None, prog: str | None = None) -> NoReturn:
    """Runs a job with its command line arguments `words` and ends the process with the job's exit code."""
    stopping.listen()  # before imports that take seconds
    environment.prepare_environment()
    prog = prog or Path(sys.argv[0]).name
    words = sys.argv[1:] if words is None else words
    debug = "--debug" in words

    def run() -> None:
        module = module_of(job)
        given = module.COMMAND.parse(words, prog)
        if job != "weights":
            check_dali()
        module.run(given)

    sys.exit(exit_code_of(run, debug))


def main() -> NoReturn:
    """The entry point of `cifar-dist` and `python -m cifar_dist`."""
    job, *words = sys.argv[1:] or ["--help"]
    if job in ("--help", "-h", "--help-all"):
        print(overview())
        sys.exit(0)
    if job == "--version":
        from cifar_dist import __version__  # noqa: PLC0415

        print(__version__)
        sys.exit(0)
    if job not in JOBS:
        print(f"cifar-dist: unknown job {job!r}{nearest(job, JOBS)}; cifar-dist --help lists them", file=sys.stderr)
        sys.exit(2)
    run_job(job, words, f"cifar-dist {job}")


def overview() -> str:
    jobs = "\n".join(f"  {name:12}{text}" for name, text in JOBS.items())
    return f"""usage: cifar-dist JOB [options]

Distributed training of image classifiers with Ray Train, DALI and PyTorch.

jobs:
{jobs}

cifar-dist JOB --help shows the options that most people need, --help-all every option.

example:
  cifar-dist pipeline --out demo"""
