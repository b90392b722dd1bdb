"""How fast a run recovers, and what share of the time trains while workers die: on real raylets with real signals.

Prints a table of n, median and range in seconds and writes it as JSON. Times end when the first step after the fault
is in a checkpoint. `start-up` is from the first new worker process to there, `beyond` the rest.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))  # its clusters can be killed node by node

from job_process import Job, train_args, wait_until  # noqa: E402
from ray_cluster import Nodes  # noqa: E402

from cifar_dist.data import sources, store  # noqa: E402
from cifar_dist.run.checkpoint import Checkpoint  # noqa: E402
from cifar_dist.run.checkpoints import Checkpoints  # noqa: E402
from cifar_dist.versions import git_commit, package_versions  # noqa: E402

HANG_SECONDS = 10


def started_at(pid: int) -> float:
    """When a process was started (seconds since the epoch)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


class Run:
    """A run that goes on until it is stopped, on a cluster of two raylets and a spare."""

    def __init__(self, nodes: Nodes, data: str, folder: Path, *more: str) -> None:
        self.nodes, self.uri = nodes, str(folder / "run")
        args = train_args(data, folder, "run", 2, "--epochs", "100000", "--checkpoint-every-steps", "1", *more)
        self.job = Job(*args, "--max-failures", "1000", "--address", nodes.address)

    def newest(self) -> Checkpoint | None:
        assert self.job.process.poll() is None, self.job.wait()
        return Checkpoints(self.uri).latest()

    def wait_for(self, attempt: int) -> float:
        """When the first checkpoint of that attempt was there."""
        wait_until(lambda: (c := self.newest()) and c.meta["attempt"] >= attempt)
        return time.time()

    def stop(self) -> None:
        self.job.process.kill()
        self.job.wait()
        wait_until(lambda: not self.nodes.train_workers())


def measure(run: Run, attempt: int, fault: Callable[[], None]) -> dict[str, float]:
    """Seconds from a fault to the next step that is stored, by attempt `attempt`."""
    before = set(run.nodes.train_workers())
    start = time.time()
    fault()
    wait_until(lambda: set(run.nodes.train_workers()) - before)
    new = min(started_at(pid) for pid in set(run.nodes.train_workers()) - before)
    end = run.wait_for(attempt)
    start_up = end - max(new, start)
    return {"total": end - start, "start_up": start_up, "beyond": end - start - start_up}


def faults(nodes: Nodes, data: str, num_times: int) -> dict[str, list[dict[str, float]]]:
    """Every kind of fault, `num_times` each, by turns in one run."""
    found: dict[str, list[dict[str, float]]] = {"worker SIGKILL": [], "node lost": [], "worker hangs": []}
    with TemporaryDirectory() as folder:
        run = Run(nodes, data, Path(folder), "--collective-timeout-seconds", str(HANG_SECONDS))
        run.wait_for(attempt := 1)

        def lose_node() -> None:
            nodes.kill(nodes.of_process(nodes.train_workers()[0]))

        acts: dict[str, Callable[[], None]] = {
            "worker SIGKILL": lambda: os.kill(nodes.train_workers()[0], signal.SIGKILL),
            "node lost": lose_node,
            "worker hangs": lambda: os.kill(nodes.train_workers()[0], signal.SIGSTOP),
        }
        for _ in range(num_times):
            for name, act in acts.items():
                time.sleep(3)
                attempt += 1
                found[name].append(measure(run, attempt, act))
                print(name, {key: round(value, 1) for key, value in found[name][-1].items()}, flush=True)
                while len(nodes.nodes) < 3:
                    nodes.add()
        run.stop()
    return found


def goodput(nodes: Nodes, data: str, minutes: float) -> dict[str, float]:
    """The share of the time that training without faults would have needed for the same steps, with a worker killed
    every minute; both are measured one after the other, start-up of the first attempt left out."""
    rates = []
    for with_faults in (False, True):
        with TemporaryDirectory() as folder:
            every = ["--checkpoint-every-steps", "0", "--checkpoint-every-seconds", "5", "--log-every-steps", "20"]
            run = Run(nodes, data, Path(folder), *every)
            run.wait_for(1)
            first, start, num_kills = run.newest(), time.time(), 0
            while (elapsed := time.time() - start) < 60 * (minutes if with_faults else min(minutes, 2)):
                if with_faults and elapsed > 60 * num_kills + 30:
                    os.kill(nodes.train_workers()[0], signal.SIGKILL)
                    num_kills += 1
                time.sleep(0.2)
            last = run.newest()
            assert first
            assert last
            rates.append((last.meta["global_step"] - first.meta["global_step"]) / (time.time() - start))
            run.stop()
    return {
        "steps_per_second": rates[0],
        "with_faults": rates[1],
        "num_kills": num_kills,
        "goodput": rates[1] / rates[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-times", type=int, default=5, help="how often each fault is made (default 5)")
    parser.add_argument("--minutes", type=float, default=5, help="of the goodput measurement (default 5, 0: none)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "recovery.json")
    args = parser.parse_args()
    nodes = Nodes(3)
    with TemporaryDirectory() as folder:
        data = f"{folder}/data"
        store.prepare(sources.shapes(num_train=60, num_test=40), data)
        found = faults(nodes, data, args.num_times)
        share = goodput(nodes, data, args.minutes) if args.minutes else {}
    nodes.stop()
    table: dict[str, Any] = {}
    print(f"{'fault':16} {'n':>2}  {'total':>22}  {'start-up':>22}  {'beyond':>22}   seconds: median (least to most)")
    for name, times in found.items():
        row = table[name] = {"n": len(times)}
        for key in ("total", "start_up", "beyond"):
            values = [t[key] for t in times]
            row[key] = [round(f(values), 2) for f in (statistics.median, min, max)]
        cells = [
            f"{m:6.1f} ({low:5.1f} to {high:5.1f})"
            for m, low, high in (row[k] for k in ("total", "start_up", "beyond"))
        ]
        print(f"{name:16} {row['n']:>2}  {'  '.join(cells)}")
    if share:
        print(f"goodput with {share['num_kills']} kills, one a minute: {share['goodput']:.1%}")
    about = {
        "cpus": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "packages": package_versions(),
    }
    command = f"python benchmarks/recovery.py --num-times {args.num_times} --minutes {args.minutes:g}"
    args.out.parent.mkdir(exist_ok=True)
    result = {"command": command, "commit": git_commit(), "hang_seconds": HANG_SECONDS, **about, "faults": table}
    args.out.write_text(json.dumps({**result, "goodput": share}, indent=2) + "\n")


if __name__ == "__main__":
    main()
