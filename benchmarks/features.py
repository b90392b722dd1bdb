"""From which epoch on cached features pay: seconds of each epoch with --features computed and cached, by turns.

    python benchmarks/features.py [--data URI] [--rounds N] [--num-epochs N] [--num-images N]

The job trains resnet50v2's head on so many images, one worker. A cached run starts with an empty cache each time. Of
an epoch the training is counted, not validation. Settings of jobs/train.py (such as `--image-size 96`) are options too.
"""

import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

from job import train_lines
from side_by_side import RESULTS, cell, measure, store, summary, table
from training_options import add_training_options, given_settings

from cifar_dist.command_line import Parser
from cifar_dist.data import sources
from cifar_dist.data import store as datasets
from cifar_dist.errors import exit_code_of

WAYS = ("computed", "cached")


def epoch_seconds(data: str, settings: dict[str, Any]) -> list[float]:
    """Seconds of training of each epoch of one run."""
    with tempfile.TemporaryDirectory() as folder:  # staged anew, so that the cache is empty
        lines = train_lines("resnet50v2", data, settings, "--staging-folder", folder)
    return [line["seconds"] for line in lines if line["kind"] == "epoch"]


def first_cheaper(computed: list[float], cached: list[float]) -> int | None:
    """The first epoch, from 1, after which all epochs together took less with the cache; None if there is none."""
    totals = zip(accumulate(computed), accumulate(cached), strict=True)
    return next((epoch for epoch, (a, b) in enumerate(totals, 1) if b < a), None)


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--data", help="a prepared data set (default: drawn shapes)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--num-epochs", type=int, default=5, help="epochs of each run (default 5)")
    p.add_argument("--num-images", type=int, default=512, help="images of an epoch (default 512)")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    add_training_options(p)
    return p


def main(args: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or f"{folder}/shapes"
        if args.data is None:
            datasets.prepare(sources.shapes(args.num_images + 100, 20), data)
        settings = {"epochs": args.num_epochs, "train_images": args.num_images, "validation_fraction": 0.002}
        settings |= given_settings(args)
        runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}

        def total(way: str) -> float:
            runs[way].append(epoch_seconds(data, {**settings, "features": way}))
            return sum(runs[way][-1])

        measure({way: lambda way=way: total(way) for way in WAYS}, args.rounds)
    rows = [
        {way: [seconds[epoch] for seconds in runs[way]] for way in WAYS} for epoch in range(len(runs["computed"][0]))
    ]
    ratios = [summary(c / u for c, u in zip(row["cached"], row["computed"], strict=True)) for row in rows]
    pays = [first_cheaper(*pair) for pair in zip(runs["computed"], runs["cached"], strict=True)]
    shown = [
        (f"epoch {i}", *(cell(summary(row[way])) for way in WAYS), cell(ratio))
        for i, (row, ratio) in enumerate(zip(rows, ratios, strict=True), 1)
    ]
    print(table(("seconds", *WAYS, "cached / computed"), shown))
    print(f"all epochs so far take less with the cache from epoch {pays}")
    print(store("features", {"settings": settings, "epochs": rows, "ratios": ratios, "pays_from": pays}, args.out))


if __name__ == "__main__":
    given = parser().parse_args()
    sys.exit(exit_code_of(lambda: main(given), given.debug))
