"""How fast and with how much memory jobs/prepare.py prepares pictures: on one core and all, and beside `datasets`.

    python benchmarks/prepare.py [--pictures N] [--repeat N] [--only speed memory] [--ways WAY ...] [--folder FOLDER]

The pictures are drawn JPEG files of a megapixel and about 160 KB (photos.py), in folders SPLIT/CLASS.

Speed, in images/s from the start of a process to its exit, on all cores but for the first way:
- full check, one core; full check; fast check: --source folder with --check full or fast.
- datasets: datasets_peer.py with Hugging Face's library in an environment of its own, which needs uv. It loads the
  folder and writes it with to_parquet. "straight": its builder writes Parquet, without an Arrow file in
  between. "all cores": a process for each core writes; otherwise one does.
A round that is thrown away comes first: the pictures and the programs are then in the page cache. Only this project
waits until its files are on the disk; "synced" adds what that takes for the files of `datasets`. "imports aside" leaves
out the time until `datasets` is imported. After each run the stored bytes and class of every picture are compared with
the folder's.

Memory, with either check, of --pictures pictures and of --times as many, which are hard links to the same files: the
most PSS of the job's processes together, and the most RSS of one process, in MB (10^6 bytes), sampled every 0.1 s.

Prints tables and writes benchmarks/results/prepare_PART.json. Everything else that it writes is removed.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measured_process import Ran, run
from photos import HEIGHT, WIDTH, make_photos, photos_in, repeat_photos
from side_by_side import RESULTS, Rounds, cell, measure, ratio, store, summary, table

from cifar_dist.command_line import Parser
from cifar_dist.errors import UserError, exit_code_of

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "parity"))

from keras_run import outside, script_command  # noqa: E402 - runs scripts in environments of their own

PEER = Path(__file__).with_name("datasets_peer.py")
ONE_CORE, FULL, FAST = "full check, one core", "full check", "fast check"
TO_PARQUET, STRAIGHT, MANY = "datasets, to_parquet", "datasets, straight", "datasets, straight, all cores"
PEERS = {
    TO_PARQUET: (),
    STRAIGHT: ("--straight",),
    MANY: ("--straight", "--processes", str(len(os.sched_getaffinity(0)))),
}
WAYS = (ONE_CORE, FULL, FAST, *PEERS)
CHECKS = ("full", "fast")
SYNCED, NO_IMPORTS = "synced", "imports aside"


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A folder of pictures, and where runs write to."""

    source: Path
    num_pictures: int
    folder: Path


def peer_command() -> list[str]:
    """What runs datasets_peer.py, without uv's own start. Raises UserError if its environment cannot be made."""
    try:
        uv = script_command(PEER)[0]
    except UserError as error:
        raise UserError(f"{error}; mend that, or leave datasets out by --ways") from error
    words = [uv, "python", "find", "--script", str(PEER)]
    return [subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip(), str(PEER)]


def peer_packages(python: str) -> dict[str, str]:
    """Returns the versions in the environment of datasets_peer.py, which has this interpreter."""
    code = "import json, importlib.metadata as m; "
    code += "print(json.dumps({name: m.version(name) for name in ('datasets', 'pillow', 'pyarrow')}))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


def parquet_files(out: Path) -> list[Path]:
    return sorted(out.rglob("*.parquet"))


def stored_in(out: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yields (file name, class name, bytes) of the pictures in Parquet files."""
    import pyarrow.parquet as pq  # noqa: PLC0415 - see compare

    for path in parquet_files(out):
        file = pq.ParquetFile(path)
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield Path(row["image"]["path"]).name, names[row["label"]], row["image"]["bytes"]


def check_stored(source: Path, out: Path) -> None:
    """Raises RuntimeError unless the Parquet files below `out` hold each picture of the source, byte for byte, once."""
    wanted = {file.name: (file.parent.name, hashlib.sha256(file.read_bytes()).digest()) for file in photos_in(source)}
    for name, label, content in stored_in(out):
        if wanted.pop(name, None) != (label, hashlib.sha256(content).digest()):
            raise RuntimeError(
                f"{name} in {out} is not the picture of the source, has another class, or is there twice"
            )
    if wanted:
        raise RuntimeError(f"{out} has {len(wanted)} pictures too few, {min(wanted)} among them")


def compare(source: Path, out: Path) -> None:
    """Does check_stored in a process of its own, so that this one shares no pages of pyarrow with measured jobs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(check_stored, source, out).result()


def seconds_to_sync(files: list[Path]) -> float:
    start = time.perf_counter()
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def prepared(pictures: Pictures, check: str, cores: set[int], with_memory: bool = False) -> Ran:
    """Prepares the pictures into a fresh folder, which is removed, and compares what is stored."""
    with tempfile.TemporaryDirectory(dir=pictures.folder) as out:
        words = ["--source", "folder", "--path", str(pictures.source), "--out", f"{out}/data", "--check", check]
        ran = run([sys.executable, str(ROOT / "jobs" / "prepare.py"), *words], cores=cores, with_memory=with_memory)
        compare(pictures.source, Path(out))
    return ran


def ways_of(
    pictures: Pictures, names: list[str], peer: list[str], aside: dict[str, list[float]]
) -> dict[str, Callable[[], float]]:
    """Way -> what measures its images/s. `peer`: its command. `aside` gets its further figures, by name."""
    cores = os.sched_getaffinity(0)
    if ONE_CORE in names and len(cores) == 1:
        raise UserError(f"this process may use one core only; allow it more, or leave {ONE_CORE!r} out by --ways")

    def rate(check: str, on: set[int]) -> float:
        return pictures.num_pictures / prepared(pictures, check, on).seconds

    def peer_rate(name: str) -> float:
        with tempfile.TemporaryDirectory(dir=pictures.folder) as out:
            where = ["--path", str(pictures.source), "--out", out]
            ran = run([*peer, *where, *PEERS[name]], cores=cores, env=outside())
            synced = ran.seconds + seconds_to_sync(parquet_files(Path(out)))
            compare(pictures.source, Path(out))
        inner = json.loads(ran.output.splitlines()[-1])["seconds"]
        for what, seconds in ((SYNCED, synced), (NO_IMPORTS, inner)):
            aside[f"{name}, {what}"].append(pictures.num_pictures / seconds)
        return pictures.num_pictures / ran.seconds

    made: dict[str, Callable[[], float]] = {
        ONE_CORE: partial(rate, "full", {max(cores)}),
        FULL: partial(rate, "full", cores),
        FAST: partial(rate, "fast", cores),
        **{name: partial(peer_rate, name) for name in PEERS},
    }
    return {name: made[name] for name in names}


def speed(pictures: Pictures, names: list[str], num_rounds: int) -> dict[str, Any]:
    """images/s of each way, and the ratios that the goals name."""
    aside: dict[str, list[float]] = defaultdict(list)
    peer = peer_command() if any(name in PEERS for name in names) else []
    rounds = measure(ways_of(pictures, names, peer, aside), num_rounds, warm_up=True)
    for name, rates in aside.items():
        for one, value in zip(rounds, rates[-num_rounds:], strict=True):  # the first is the warm-up's
            one[name] = value
    return {
        "images_per_second": {name: summary(one[name] for one in rounds) for name in rounds[0]},
        "ratios": ratios_of(rounds),
        "peer_packages": peer_packages(peer[0]) if peer else {},
        "rounds": rounds,
    }


def ratios_of(rounds: Rounds) -> dict[str, dict[str, float]]:
    pairs = [(FULL, ONE_CORE), *((ours, peer) for peer in PEERS for ours in (FAST, FULL))]
    pairs += [(FAST, f"{peer}, {SYNCED}") for peer in PEERS]
    return {f"{way} over {base}": ratio(rounds, way, base) for way, base in pairs if {way, base} <= rounds[0].keys()}


def memory(sets: dict[str, Pictures], num_rounds: int) -> dict[str, Any]:
    """Memory and seconds of each check on each set."""
    cores, found = os.sched_getaffinity(0), defaultdict[str, list[Ran]](list)

    def peak(name: str, pictures: Pictures, check: str) -> float:
        found[name].append(prepared(pictures, check, cores, with_memory=True))
        return found[name][-1].memory.pss

    cases = {f"{check} check, {name}": (pictures, check) for check in CHECKS for name, pictures in sets.items()}
    rounds = measure({name: partial(peak, name, *case) for name, case in cases.items()}, num_rounds)
    small, large = sets
    return {
        "cases": {
            name: {
                "peak_pss_mb": summary(ran.memory.pss for ran in runs),
                "largest_rss_mb": summary(ran.memory.rss for ran in runs),
                "num_processes": max(ran.memory.num_processes for ran in runs),
                "seconds": summary(ran.seconds for ran in runs),
            }
            for name, runs in found.items()
        },
        "growth": {c: ratio(rounds, f"{c} check, {large}", f"{c} check, {small}") for c in CHECKS},
    }


def print_tables(results: dict[str, Any]) -> None:
    if found := results.get("speed"):
        print(table(("", "images/s"), [(name, cell(s, 1)) for name, s in found["images_per_second"].items()]))
        print(table(("", "ratio"), [(name, cell(s)) for name, s in found["ratios"].items()]))
    if found := results.get("memory"):
        columns = ("peak_pss_mb", "largest_rss_mb", "seconds")
        rows = [(name, *(cell(case[c], 1) for c in columns)) for name, case in found["cases"].items()]
        print(table(("", *(c.replace("_", " ") for c in columns)), rows))
        print(table(("", "peak over that of fewer"), [(c, cell(s)) for c, s in found["growth"].items()]))


def refuse_little_room(folder: Path, num_pictures: int, times: int) -> None:
    """Raises UserError if the pictures and the largest set that is written from them do not fit."""
    needed, free = num_pictures * 200_000 * (times + 2), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; choose another --folder, or "
            "fewer --pictures"
        )


def main(args: Namespace) -> None:
    if args.pictures < 10 or args.repeat < 1 or args.times < 2:
        raise UserError("--pictures must be 10 or more, --repeat 1 or more, --times 2 or more")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name).absolute()
        refuse_little_room(folder, args.pictures, args.times)
        num_bytes = make_photos(folder / "pictures", args.pictures)
        about = {"num_pictures": args.pictures, "width": WIDTH, "height": HEIGHT, "pillow": version("pillow")}
        results: dict[str, Any] = {"pictures": {**about, "mean_bytes": round(num_bytes / args.pictures)}}
        print(results["pictures"], flush=True)
        pictures = Pictures(source=folder / "pictures", num_pictures=args.pictures, folder=folder)
        if "speed" in args.only:
            results["speed"] = speed(pictures, [name for name in WAYS if name in args.ways], args.repeat)
        if "memory" in args.only:
            num_more = args.times * args.pictures
            repeat_photos(pictures.source, args.times, folder / "more")
            more = Pictures(source=folder / "more", num_pictures=num_more, folder=folder)
            sets = {f"{args.pictures:,} pictures": pictures, f"{num_more:,} pictures": more}
            results["memory"] = memory(sets, args.repeat)
    print_tables(results)
    for part in args.only:
        print(store(f"prepare_{part}", {"pictures": results["pictures"], part: results[part]}, args.out))


def options() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000, help="pictures to draw (default 2000)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--times", type=int, default=10, help="memory: times of the pictures in the larger set")
    parser.add_argument(
        "--only", nargs="+", choices=("speed", "memory"), default=("speed", "memory"), help="these parts"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="these ways of speed")
    parser.add_argument("--folder", help="where pictures and data sets go for the time of the run, 5 GB")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


if __name__ == "__main__":
    given = options().parse_args()
    sys.exit(exit_code_of(lambda: main(given), given.debug))
