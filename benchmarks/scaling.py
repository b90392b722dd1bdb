"""What more workers bring, where the time to the first step goes, and what more evaluation shards bring.

    python benchmarks/scaling.py [--data URI] [--only fan resnet50v2] [--parts scaling start-up evaluation]
                                 [--rounds N] [--num-steps N] [--num-images N]

- scaling: images/s of jobs/train.py with 2 workers of one thread each over 1 worker of two, on two cores; the same
  global batch, timed as in job.py.
- start-up: seconds from the start of jobs/train.py to its first finished step, with 1 and 2 workers, in the phases that
  the job itself prints; and from its last step to its exit, its last checkpoint included. One start before is thrown
  away, so that the data are staged.
- evaluation: images/s of `evaluate.driver` with 1 and 2 shards of a thread each, on a cluster whose processes are
  there: from the call to the merged predictions of --num-images test images.

Start-up and evaluation run on drawn shapes. Settings of jobs/train.py (such as `--precision fp32`) are options too.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from job import TRAIN, add_options, case_of, job_rate
from side_by_side import cell, measure, ratio, store, summary, table
from training_options import given_settings

from cifar_dist.command_line import Parser
from cifar_dist.data import sources
from cifar_dist.data import store as datasets
from cifar_dist.data.staged import DataSet
from cifar_dist.environment import prepare_environment
from cifar_dist.launch import cluster

RAY_ADDRESS = prepare_environment()

PARTS = ("scaling", "start-up", "evaluation")
FIRST_STEP = re.compile(r"first step after [\d.]+ s: (.*)")


def scaling(args: Any, model: str, folder: str) -> dict[str, Any]:
    """images/s by the number of workers."""
    case = case_of(args, model, folder)
    rounds = measure({f"{n} workers": lambda n=n: job_rate(case, n) for n in (1, 2)}, args.rounds)
    rates = {way: summary(r[way] for r in rounds) for way in rounds[0]}
    about = {"part": "scaling", "model": model, "batch_size": case.batch_size, "num_cpus": os.cpu_count()}
    return {**about, "images_per_second": rates, "2 over 1": ratio(rounds, "2 workers", "1 workers"), "rounds": rounds}


def phases_in(output: str) -> dict[str, float]:
    """Seconds by phase, from the line that jobs/train.py prints after its first step."""
    if not (line := FIRST_STEP.search(output)):
        raise RuntimeError(f"jobs/train.py did not say how it started:\n{output[-4000:]}")
    return {name: float(seconds) for name, _, seconds in (p.rpartition(" ") for p in line[1].split(", "))}


def start(model: str, data: str, storage: Path, name: str, num_workers: int, overrides: dict[str, Any]) -> dict:
    """One run of a few steps: its phases up to the first step, their sum, and the seconds after the last one."""
    settings = {"epochs": 1, "train_images": 30, "global_batch_size": 10, "validation_fraction": 0.3, **overrides}
    command = [sys.executable, str(TRAIN), "--recipe", f"deck_{model}", "--data", data, "--storage", str(storage)]
    command += ["--name", name, "--workers", str(num_workers)]
    command += [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    output, ended_at = "", 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout
        for line in job.stdout:
            output += line
            if line.startswith("epoch 1/1 done"):
                ended_at = time.monotonic()
    if job.returncode:
        raise RuntimeError(f"jobs/train.py failed:\n{output[-4000:]}")
    phases = phases_in(output)
    return {"total": sum(phases.values()), **phases, "end": time.monotonic() - ended_at}


def start_up(model: str, data: str, storage: Path, num_rounds: int, overrides: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds by phase, for 1 and 2 workers."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}

    def total(num_workers: int) -> float:
        starts = found[num_workers]
        starts.append(start(model, data, storage, f"{model}-{num_workers}-{len(starts)}", num_workers, overrides))
        return starts[-1]["total"]

    measure({f"{model}, {n} workers": lambda n=n: total(n) for n in found}, num_rounds, warm_up=True)
    return [
        {
            "part": "start-up",
            "model": model,
            "num_workers": n,
            "seconds": {phase: summary(s[phase] for s in starts[1:]) for phase in starts[0]},
        }
        for n, starts in found.items()
    ]


def evaluation(model: str, data: str, storage: Path, num_rounds: int, num_images: int) -> dict[str, Any]:
    """images/s by the number of shards, of the first run that start_up() has made."""
    from cifar_dist.evaluate import driver  # noqa: PLC0415 - imports Ray

    cluster.connect(RAY_ADDRESS, 2)
    data_set = DataSet.open(data)
    chosen = driver.choose([str(storage / f"{model}-1-0")], data_set)

    def rate(num_shards: int) -> float:
        begin = time.perf_counter()
        driver.evaluate(chosen, data_set, str(storage / "report"), num_shards=num_shards, splits=("test",))
        return num_images / (time.perf_counter() - begin)

    rounds = measure({f"{n} shards": lambda n=n: rate(n) for n in (1, 2)}, num_rounds, warm_up=True)
    rates = {way: summary(r[way] for r in rounds) for way in rounds[0]}
    about = {"part": "evaluation", "model": model, "num_images": num_images}
    return {**about, "images_per_second": rates, "2 over 1": ratio(rounds, "2 shards", "1 shards"), "rounds": rounds}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured (default: all)")
    parser.add_argument("--num-images", type=int, default=2000, help="images that are evaluated (default 2000)")
    add_options(parser)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []

    def keep(*found: dict[str, Any]) -> None:
        results.extend(found)
        store("scaling", results, args.out)  # a run takes most of an hour: what there is is kept

    with tempfile.TemporaryDirectory() as folder:
        if "scaling" in args.parts:
            for model in args.only:
                keep(scaling(args, model, folder))
        data, storage, overrides = f"{folder}/shapes", Path(folder, "runs"), given_settings(args)
        datasets.prepare(sources.shapes(100, args.num_images), data)
        for model in args.only:
            if "start-up" in args.parts:
                keep(*start_up(model, data, storage, args.rounds, overrides))
            elif "evaluation" in args.parts:
                start(model, data, storage, f"{model}-1-0", 1, overrides)
        if "evaluation" in args.parts:
            for model in args.only:
                keep(evaluation(model, data, storage, args.rounds, args.num_images))
    show(results)
    print(store("scaling", results, args.out))


def show(results: list[dict[str, Any]]) -> None:
    rates = [
        (f"{r['part']}, {r['model']}", *(cell(s, 1) for s in r["images_per_second"].values()), cell(r["2 over 1"]))
        for r in results
        if "2 over 1" in r
    ]
    if rates:
        print(table(("images/s", "1", "2", "2 over 1"), rates))
    if starts := [r for r in results if r["part"] == "start-up"]:
        header = ("seconds", *(f"{r['model']}, {r['num_workers']} workers" for r in starts))
        print(table(header, [(phase, *(cell(r["seconds"][phase]) for r in starts)) for phase in starts[0]["seconds"]]))


if __name__ == "__main__":
    main()
