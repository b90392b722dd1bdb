"""What all benchmarks share: ways measured by turns in one run, ratios within a round, a table and a JSON file.

The machine's other load and its clock hit all ways of a round alike, so a ratio is taken within its round; its median
and range over the rounds are what is reported. Absolute figures are medians, and of less worth.
"""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cifar_dist.versions import git_commit, package_versions

RESULTS = Path(__file__).parent / "results"

Rounds = list[dict[str, float]]


def measure(ways: Mapping[str, Callable[[], float]], num_rounds: int, warm_up: bool = False) -> Rounds:
    """Every way's figure (images/s, seconds, ...) once per round, in an order that turns from round to round.

    `warm_up` runs each way once before, and throws that away.
    """
    names = list(ways)
    if warm_up:
        for name in names:
            ways[name]()
    found: Rounds = []
    for i in range(num_rounds):
        turned = names[i % len(names) :] + names[: i % len(names)]
        figures = {name: ways[name]() for name in turned}
        found.append({name: figures[name] for name in names})
        print(f"round {i + 1}/{num_rounds}: " + ", ".join(f"{n} {v:.4g}" for n, v in found[-1].items()), flush=True)
    return found


def summary(values: Iterable[float]) -> dict[str, float]:
    """n, median, least and most."""
    numbers = list(values)
    return {"n": len(numbers), "median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def ratio(rounds: Rounds, way: str, base: str, inverse: bool = False) -> dict[str, float]:
    """The summary of way / base within each round; `inverse` for figures where less is better: base / way."""
    return summary((r[base] / r[way]) if inverse else (r[way] / r[base]) for r in rounds)


def hardware() -> dict[str, Any]:
    """The processor by name, its cores, the bf16 matrix units that it has, the GPU if there is one."""
    import torch  # noqa: PLC0415 - some benchmarks time the import

    info = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "").split()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {"processor": model, "num_cpus": os.cpu_count(), "instruction_sets": units, "gpu": gpu}


def cell(stats: Mapping[str, float], digits: int = 2) -> str:
    """'1.23 (1.20 to 1.25, n=5)'."""
    median, low, high = (f"{stats[k]:,.{digits}f}" for k in ("median", "low", "high"))
    return f"{median} ({low} to {high}, n={stats['n']:.0f})"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Lines with columns aligned, the first to the left."""
    all_rows = [header, *rows]
    widths = [max(len(row[i]) for row in all_rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in all_rows
    )


def store(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Writes results/NAME.json: the command, the commit, the hardware, the packages, the results."""
    about = {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": git_commit(),
        "hardware": hardware(),
        "packages": package_versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    target.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    return target
