"""What grows with the data set: memory per worker and seconds to the first step at 1, 10 and 50 times CIFAR-10.

    python benchmarks/growth.py --data URI [--scales 1 10 50] [--rounds N] [--folder FOLDER]

A data set of N times the rows has each train file of `--data` (a local prepared data set) N times, as hard links. Each
round trains on every size by turns, `--workers` workers through jobs/train.py with --cache auto: first with nothing
staged (cold), then with what that run staged (warm). Both have the pages that the machine still caches. A run is ended
`--seconds` after its first step.

Measured from outside. Of the workers, read from /proc every 10 ms: anonymous memory, which a worker has for itself, at
its peak and at the end; and at the end what else is mapped: USS, PSS and RSS count pages of the staged files, which all
workers share and the system takes back when it needs room. Seconds from the start of the job: until the workers say
that they train, and until the first step's line is printed (looked for twice a second).

Prints a table and writes benchmarks/results/growth.json; with --add the rounds join those that are there.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from cifar_dist.command_line import Parser
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.sealed_json import seal, to_json

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cluster"), str(Path(__file__).parent)]

from job_process import Job  # noqa: E402 - a job that can be ended with all its processes
from side_by_side import RESULTS, cell, summary, table  # noqa: E402
from side_by_side import store as store_results  # noqa: E402

from cifar_dist.data import sources, store  # noqa: E402
from cifar_dist.data.manifest import MANIFEST, Manifest, read_manifest  # noqa: E402

# The frozen network at its smallest image takes the least memory and time of its own.
NETWORK = ("--recipe", "quickstart_resnet50v2", "--global-batch-size", "16", "--log-every-steps", "1")
MIB = 1 << 20


def repeat(data: str, times: int, target: Path) -> Manifest:
    """A data set with every train row of the local one at `data` `times` times; files are hard links where they can."""
    manifest = read_manifest(data)
    split = manifest.splits["train"]
    target.mkdir(parents=True)
    files = []
    for i, file in enumerate(split["files"] * times):
        files.append({**file, "name": f"train-{i:05d}.parquet"})
        link(Path(data, file["name"]), target / files[-1]["name"])
    for file in manifest.splits["test"]["files"]:
        link(Path(data, file["name"]), target / file["name"])
    counts = {"num_rows": times * split["num_rows"]}
    counts |= {"num_rows_per_class": [times * n for n in split["num_rows_per_class"]]}
    splits = {**manifest.splits, "train": {**split, **counts, "files": files}}
    values = {**asdict(manifest), "source": f"{manifest.source}, {times} times", "splits": splits}
    repeated = Manifest(**seal(values))
    (target / MANIFEST).write_bytes(to_json(asdict(repeated)))
    return repeated


def link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # another file system
        shutil.copy(file, name)


def kib_of(file: Path) -> dict[str, int]:
    """The 'Name: 12 kB' lines of a file in /proc; none of a process that has ended."""
    try:
        words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) == 3 and w[2] == "kB"}


class Sampler(threading.Thread):
    """Reads the workers' anonymous memory every 10 ms until it is stopped: `peaks` has the most per process, in KiB."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.job, self.peaks, self.stopped = job, dict[int, int](), threading.Event()

    def run(self) -> None:
        look_at = 0.0
        pids: list[int] = []
        while not self.stopped.wait(0.01):
            if time.monotonic() > look_at:  # costs more than all else here
                pids, look_at = self.job.family("RayTrainWorker"), time.monotonic() + 0.5
            for pid in pids:
                now = kib_of(Path(f"/proc/{pid}/status")).get("RssAnon", 0)
                self.peaks[pid] = max(self.peaks.get(pid, 0), now)


def lines_of(job: Job) -> str:
    return os.pread(job.log.fileno(), 1 << 20, 0).decode(errors="replace")  # its own position stays where it is


def seconds_until(job: Job, start: float, pattern: str, limit: float = 300) -> float:
    """Seconds from `start` until the job has printed what matches."""
    while not re.search(pattern, lines_of(job)):
        if job.process.poll() is not None or time.monotonic() - start > limit:
            raise UserError(f"the run never printed {pattern}:\n{lines_of(job)}")
        time.sleep(0.05)
    return time.monotonic() - start


def run(data: Path, folder: Path, workers: int, seconds: float) -> dict[str, float]:
    """One run on `data`, staged below `folder`: the worst worker's memory in MiB, and the seconds."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    start = time.monotonic()
    where = ["--data", str(data), "--storage", str(folder / "runs"), "--name", "run", "--device", "cpu"]
    job = Job("train.py", *NETWORK, *where, "--staging-folder", str(folder), "--workers", str(workers), local=True)
    sampler = Sampler(job)
    sampler.start()
    try:
        ready = seconds_until(job, start, "training resnet50v2 on")
        first_step = seconds_until(job, start, r"epoch 1/\d+ step \d")
        time.sleep(seconds)
        pids = job.family("RayTrainWorker")
        ends = [kib_of(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids]
        if len(ends) != workers or not all(ends):
            raise UserError(f"{len(ends)} of {workers} workers are left:\n{lines_of(job)}")
    finally:
        sampler.stopped.set()
        sampler.join()
        job.end()
    uss = [end["Private_Clean"] + end["Private_Dirty"] for end in ends]
    columns = {
        "anonymous_peak_mib": [sampler.peaks[pid] for pid in pids],
        "anonymous_end_mib": [end["Anonymous"] for end in ends],
        "uss_end_mib": uss,
        **{f"{name.lower()}_end_mib": [end[name] for end in ends] for name in ("Pss", "Rss")},
    }
    memory = {name: round(max(values) * 1024 / MIB, 1) for name, values in columns.items()}
    return {**memory, "ready_seconds": round(ready, 2), "first_step_seconds": round(first_step, 2)}


def print_table(rounds: list[dict]) -> None:
    columns = ("anonymous_peak_mib", "anonymous_end_mib", "uss_end_mib", "pss_end_mib", "rss_end_mib")
    columns += ("ready_seconds", "first_step_seconds")
    groups: dict[tuple[int, str], list[dict]] = {}
    for one in rounds:
        groups.setdefault((one["num_images"], one["staging"]), []).append(one)
    rows = [
        (f"{num_images:,} images, {staging}", *(cell(summary(r[c] for r in group), 1) for c in columns))
        for (num_images, staging), group in sorted(groups.items())
    ]
    print(table(("data set", *(c.replace("_", " ") for c in columns)), rows))


def main(args: Namespace) -> None:
    file = args.out / "growth.json"
    rounds = json.loads(file.read_text())["results"]["runs"] if args.add and file.exists() else []
    with TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name).absolute()
        base = args.data and os.path.abspath(args.data)
        if not base:
            base = str(folder / "shapes")
            store.prepare(sources.shapes(args.num_images, 20), base)
        sets = {scale: repeat(base, scale, folder / f"data-{scale}") for scale in args.scales}
        first = len(rounds) // (2 * len(args.scales))
        for i in range(first, first + args.rounds):
            for scale in args.scales[i % len(args.scales) :] + args.scales[: i % len(args.scales)]:
                for staging in ("cold", "warm"):
                    found = run(folder / f"data-{scale}", folder / "staged", args.workers, args.seconds)
                    about = {"scale": scale, "num_images": sets[scale].num_rows("train"), "staging": staging}
                    rounds.append({**about, **found})
                    print(rounds[-1], flush=True)
                    results = {"num_workers": args.workers, "seconds_after_first_step": args.seconds, "runs": rounds}
                    target = store_results("growth", results, args.out)
                shutil.rmtree(folder / "staged")
    print_table(rounds)
    print(target)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--data", help="a local prepared data set (default: drawn shapes, --num-images of them)")
    parser.add_argument("--num-images", type=int, default=1000, help="shapes to draw without --data (default 1000)")
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10, 50], help="times of the data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="of training after the first step (default 5)")
    parser.add_argument("--folder", help="where data sets and staged files go, 5 GB for 50 times CIFAR-10")
    parser.add_argument("--add", action="store_true", help="add the rounds to those of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    sys.exit(exit_code_of(lambda: main(options), options.debug))
