"""The recipe best_fan, and the recipe with one choice changed, on a subset: what the choice brings.

Accuracy is on validation; the test split is not read. All runs of a seed see the same images in the same order.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cifar_dist.command_line import Parser

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, list[str]] = {
    "best_fan": [],
    "Adam at 1e-3, not Muon": ["--optimizer", "adam"],
    "flipped vertically too": ["--flips", "both"],
    "constant rate": ["--schedule", "constant", "--warmup-fraction", "0"],
    "Muon's rate 0.02, not 0.035": ["--muon-learning-rate", "0.02"],
    "input in 0..1": ["--input-range", "0..1"],
    "batch 128, not 64": ["--global-batch-size", "128"],
    "label smoothing 0.1": ["--label-smoothing", "0.1"],
    "crop, padding 2": ["--crop-padding", "2"],
    "cutout of 8 px": ["--cutout-size", "8"],
    "moving statistics, momentum 0.9": ["--recalibrate-batches", "0"],
    "moving statistics, momentum 0.99": ["--recalibrate-batches", "0", "--batchnorm-momentum", "0.99"],
    "weight average, decay 0.95": ["--ema-decay", "0.95"],
}


def validation_accuracy(data: str, seed: int, num_images: int, options: list[str]) -> dict[str, float]:
    """One run of best_fan, one epoch over `num_images`, with `options`; what its epoch line says."""
    with tempfile.TemporaryDirectory() as storage:
        command = ["--recipe", "best_fan", "--data", data, "--storage", storage, "--name", "run", "--epochs", "1"]
        command += ["--seed", str(seed), "--train-images", str(num_images), *options]
        subprocess.run([sys.executable, ROOT / "jobs" / "train.py", *command], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(storage, "run", "metrics.jsonl").read_text().splitlines()]
    (epoch,) = (line for line in lines if line["kind"] == "epoch")
    return {k: epoch[k] for k in ("validation_accuracy", "train_accuracy", "images_per_second", "num_validation")}


def summary(runs: dict[str, dict[int, dict[str, float]]]) -> list[dict]:
    rows = []
    for name, by_seed in runs.items():
        accuracy = [run["validation_accuracy"] for run in by_seed.values()]
        pairs = [
            run["validation_accuracy"] - runs["best_fan"][seed]["validation_accuracy"]
            for seed, run in by_seed.items()
            if seed in runs["best_fan"]
        ]
        row = {"variant": name, "n": len(accuracy), "validation_accuracy": statistics.mean(accuracy)}
        rows.append(row | {"accuracies": accuracy, "difference": statistics.mean(pairs), "differences": pairs})
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared CIFAR-10")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--num-seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so long")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="after --, for every run of jobs/train.py")
    args = parser.parse_args()
    common = [option for option in args.options if option != "--"]
    runs: dict[str, dict[int, dict[str, float]]] = {}
    target = Path(__file__).parent / "results" / "ablation.json"
    start = time.monotonic()
    target.parent.mkdir(exist_ok=True)
    for seed, name in itertools.product(range(args.num_seeds), args.variants):
        if time.monotonic() - start > 60 * args.minutes:
            break
        found = validation_accuracy(args.data, seed, args.num_images, [*common, *VARIANTS[name]])
        runs.setdefault(name, {})[seed] = found
        print(f"seed {seed} {name:34} validation {found['validation_accuracy']:.2%}", flush=True)
        hardware = {"processor": platform.processor() or platform.machine(), "options": common}
        table = {"hardware": hardware, "num_images": args.num_images, "epochs": 1, "results": summary(runs)}
        target.write_text(json.dumps(table, indent=2) + "\n")
    for row in summary(runs):
        low, high = min(row["differences"]), max(row["differences"])
        print(
            f"{row['variant']:34} {row['validation_accuracy']:7.2%}  {100 * row['difference']:+6.2f} points "
            f"({100 * low:+.2f} to {100 * high:+.2f}, n={row['n']})"
        )


if __name__ == "__main__":
    main()
