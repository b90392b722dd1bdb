"""The choices inside a training step on a CPU: precision and layout, the frozen base, kept memory, dropout.

    python benchmarks/step.py [--only PART ...] [--rounds N] [--num-steps N] [--image-size PX]

- precision: images/s of job.py's bare loop, both networks, fp32 and bf16, contiguous and channels_last.
- memory: the same in bf16, channels_last, with the MALLOC_* settings by which the C library keeps freed memory, and
  without them.
- base: images/s of the frozen ResNet50V2 base alone: plain in inference mode, folded, and folded in chunks of images.
- dropout: million values per second of torch's dropout and of ours, in training mode.

Drawn images, on all cores; each figure of the first two parts comes from a process of its own.
Prints a table and writes benchmarks/results/step.json.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from job import Case, bare_rate
from side_by_side import RESULTS, Rounds, cell, measure, ratio, store, summary, table

from cifar_dist import models
from cifar_dist.command_line import Parser
from cifar_dist.data import sources
from cifar_dist.data import store as datasets
from cifar_dist.environment import prepare_environment
from cifar_dist.errors import exit_code_of
from cifar_dist.models import frozen
from cifar_dist.models.layers import Dropout

PRECISIONS, LAYOUTS = ("fp32", "bf16"), ("contiguous", "channels_last")
BATCH_SIZE = 64
CHUNKS = 4, 8, 16, 32
NUM_VALUES = 30_000_000  # of dropout, about what a step of Fan drops at 64 images

Ways = dict[str, Callable[[], float]]


def without_kept_memory(case: Case) -> float:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with patch.dict(os.environ, kept, clear=True):
        return bare_rate(case, 1)


def step_ways(cases: dict[str, Case], part: str) -> dict[str, Ways]:
    found: dict[str, Ways] = {}
    for model, case in cases.items():
        made = {
            f"{precision}, {layout}": Case(
                *(model, case.data, case.num_skipped, case.num_steps),
                {**case.overrides, "precision": precision, "memory_format": layout},
            )
            for precision in PRECISIONS
            for layout in LAYOUTS
        }
        best = made["bf16, channels_last"]
        found[f"{part}, {model}"] = (
            {way: partial(bare_rate, one, 1) for way, one in made.items()}
            if part == "precision"
            else {"memory kept": partial(bare_rate, best, 1), "given back": partial(without_kept_memory, best)}
        )
    return found


def rate_of(call: Callable[[], object], num_items: int, num_calls: int) -> float:
    """Items per second, after one call that is not counted."""
    call()
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    return num_items * num_calls / (time.perf_counter() - start)


def base_ways(image_size: int, num_calls: int) -> dict[str, Ways]:
    model: Any = models.build("resnet50v2")
    images = torch.rand(BATCH_SIZE, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    found: dict[str, Ways] = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folded = frozen.FrozenBase(model.base, dtype)
        plain = models.build("resnet50v2").base.eval().to(dtype).to(memory_format=torch.channels_last)

        def chunked(size: int, folded: frozen.FrozenBase = folded) -> torch.Tensor:
            with patch.object(frozen, "CPU_CHUNK", size):
                return folded(images)

        def in_inference_mode(plain: Any = plain, dtype: torch.dtype = dtype) -> torch.Tensor:
            with torch.inference_mode():
                return plain(images.to(dtype))

        calls: dict[str, Callable[[], object]] = {"plain": in_inference_mode, "folded": partial(chunked, BATCH_SIZE)}
        calls |= {f"chunks of {size}": partial(chunked, size) for size in CHUNKS}
        found[f"base, {precision}"] = {n: partial(rate_of, call, BATCH_SIZE, num_calls) for n, call in calls.items()}
    return found


def dropout_ways(num_calls: int) -> dict[str, Ways]:
    values = torch.rand(NUM_VALUES).bfloat16()
    layers = {"torch": torch.nn.Dropout(0.1).train(), "ours": Dropout(0.1).train()}
    calls = {
        name: partial(rate_of, partial(layer, values), NUM_VALUES / 1e6, num_calls) for name, layer in layers.items()
    }
    return {"dropout, bf16": calls}


def parser() -> Parser:
    p = Parser(description=__doc__)
    parts = ("precision", "memory", "base", "dropout")
    p.add_argument("--only", nargs="+", choices=parts, default=parts, help="these parts")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--num-skipped", type=int, default=2, help="first steps, which are not timed (default 2)")
    p.add_argument("--num-steps", type=int, default=6, help="steps, or calls of a part, that are timed (default 6)")
    p.add_argument("--image-size", type=int, default=224, help="of resnet50v2 (default 224)")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return p


def main(args: Any) -> None:
    prepare_environment()  # the bare loop's processes keep freed memory as the job's do
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        datasets.prepare(sources.shapes(BATCH_SIZE * 8, 20), folder)
        steps = folder, args.num_skipped, args.num_steps
        common = {"global_batch_size": BATCH_SIZE}
        cases = {"fan": Case("fan", *steps, common)}
        cases["resnet50v2"] = Case("resnet50v2", *steps, {**common, "image_size": args.image_size})
        ways: dict[str, Ways] = {}
        for part in ("precision", "memory"):
            ways |= step_ways(cases, part) if part in args.only else {}
        ways |= base_ways(args.image_size, args.num_steps) if "base" in args.only else {}
        ways |= dropout_ways(args.num_steps) if "dropout" in args.only else {}
        for name, measured in ways.items():
            print(name, flush=True)
            rounds: Rounds = measure(measured, args.rounds)
            first = next(iter(measured))
            results[name] = {
                "rates": {way: summary(r[way] for r in rounds) for way in measured},
                f"over {first}": {way: ratio(rounds, way, first) for way in measured},
            }
    rows = []
    for name, result in results.items():
        rates, (base, ratios) = result["rates"], list(result.items())[1]
        rows += [(f"{name}: {way}", cell(rates[way], 1), f"{cell(ratios[way])} {base}") for way in rates]
    print(table(("", "per second", "ratio"), rows))
    print(store("step", results, args.out))


if __name__ == "__main__":
    given = parser().parse_args()
    sys.exit(exit_code_of(lambda: main(given), given.debug))
