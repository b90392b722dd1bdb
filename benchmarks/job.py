"""The whole job over a bare loop: images/s of jobs/train.py over plain PyTorch on tensors already in memory.

    python benchmarks/job.py [--data URI] [--only fan resnet50v2] [--workers 1 2] [--rounds N] [--num-steps N]

The job is Ray Train, DALI's input, logging and all else at their defaults. The bare loop has the same network,
optimizer, batch, precision, memory format and threads from the same library functions, on batches made before: no Ray,
no DALI, no totals, no log; two workers are two processes that exchange gradients in the same way. Settings of
jobs/train.py (such as `--precision fp32`) are options here too, and hold for both.

images/s are wall clock over --num-steps steps after --num-skipped, start-up and validation outside; the job's from the
times in its metrics.jsonl. The job trains one step more than is timed, so that the last timed one has the next batch's
input beside it as all others do.
"""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from side_by_side import RESULTS, Rounds, cell, measure, ratio, store, summary, table
from training_options import add_training_options, given_settings

from cifar_dist.command_line import Parser
from cifar_dist.config import Config
from cifar_dist.data import manifest, sources
from cifar_dist.data import store as datasets
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.environment import prepare_environment
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.models import MODELS
from cifar_dist.models.frozen import split_frozen
from cifar_dist.recipes import recipe_config
from cifar_dist.run.network import Precision, build_model, image_spec
from cifar_dist.train.communication import parallel
from cifar_dist.train.optim import make_optimizers, set_step

TRAIN = Path(__file__).parents[1] / "jobs" / "train.py"
NUM_IN_MEMORY = 8  # batches that the bare loop goes round


@dataclass(frozen=True)
class Case:
    """One network on one data set, and which of its steps are timed. `overrides`: settings by short name."""

    model: str
    data: str
    num_skipped: int
    num_steps: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return recipe_config(f"deck_{self.model}", **self.overrides)

    @property
    def batch_size(self) -> int:
        return self.config.loop.global_batch_size


def steady_rate(lines: Sequence[dict[str, Any]], num_skipped: int, num_steps: int, batch_size: int) -> float:
    """images/s between the log lines after step `num_skipped` and `num_steps` later; `seconds` count from the epoch's
    start."""
    seconds = {line["step"]: line["seconds"] for line in lines if line["kind"] == "step" and line["epoch"] == 0}
    return num_steps * batch_size / (seconds[num_skipped + num_steps] - seconds[num_skipped])


def train_lines(model: str, data: str, settings: dict[str, Any], *words: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one run of jobs/train.py with settings by short name and more options."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, str(TRAIN), "--recipe", f"deck_{model}", "--data", data]
        command += ["--storage", storage, "--name", "run", *words]
        command += [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"jobs/train.py failed:\n{done.stdout[-4000:]}")
        return [json.loads(line) for line in Path(storage, "run", "metrics.jsonl").read_text().splitlines()]


def job_rate(case: Case, num_workers: int, **more: Any) -> float:
    """images/s of one run of jobs/train.py, with `more` settings."""
    settings = {
        "epochs": 1,
        "train_images": (case.num_skipped + case.num_steps + 1) * case.batch_size,
        "validation_fraction": 0.002,
        "log_every_steps": next(n for n in range(20, 0, -1) if not case.num_skipped % n and not case.num_steps % n),
        **case.overrides,
        **more,
    }
    lines = train_lines(case.model, case.data, settings, "--workers", str(num_workers))
    return steady_rate(lines, case.num_skipped, case.num_steps, case.batch_size)


def decoded_images(uri: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, h, w, 3], int64 [n]): the first images of the train split, again and again if there are too few."""
    with tempfile.TemporaryDirectory() as folder:
        staged = DataSet.open(uri, Staging(folder=folder)).stage("train")
        rows = np.arange(num_images) % len(staged)
        pixels = [np.asarray(Image.open(io.BytesIO(staged.encoded(i).tobytes())).convert("RGB")) for i in rows]
    return np.stack(pixels), staged.labels[rows]


def batches_in_memory(case: Case, rank: int, num_workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's parts of some batches, as the network takes them."""
    config, size = case.config, case.batch_size // num_workers
    spec = image_spec(config, torch.device("cpu"))
    pixels, labels = decoded_images(case.data, NUM_IN_MEMORY * case.batch_size)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    made = []
    for start in range(rank * size, len(labels), case.batch_size):
        images = torch.from_numpy(pixels[start : start + size]).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, (spec.image_size, spec.image_size), mode="bilinear", align_corners=False)
        images = (images / 255).contiguous(memory_format=layout)  # whatever the range, it takes as long
        made.append((images, torch.from_numpy(labels[start : start + size])))
    return made


def bare_loop(rank: int, num_workers: int, case: Case, meeting: str) -> float:
    """images/s of all ranks, as one rank sees it."""
    config, device = case.config, torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))
    batches = batches_in_memory(case, rank, num_workers)
    spec = image_spec(config, device)
    model = build_model(config, int(max(labels.max() for _, labels in batches)) + 1, spec, device)
    optimizers = make_optimizers(model, config.optim)
    precision = Precision(config.loop.precision, device)
    base, wrapped = split_frozen(model, precision.dtype)
    if num_workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=num_workers)
        factors = case.batch_size, precision.dtype
        wrapped, communication = parallel(wrapped, device, config.loop.gradient_dtype, factors)
        communication.num_rows = -(-case.batch_size // num_workers)
    wrapped.train()
    num_steps = case.num_skipped + case.num_steps
    for step in range(num_steps):
        if step == case.num_skipped:
            start = time.perf_counter()
        set_step(optimizers, config.optim, step, num_steps)
        images, labels = batches[step % len(batches)]
        with precision.autocast():
            logits = wrapped(base(images) if base else images)
        F.cross_entropy(logits.float(), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    if num_workers > 1:
        dist.destroy_process_group()
    return case.num_steps * case.batch_size / seconds


def in_processes(function: Callable[..., float], num_processes: int, *args: object) -> float:
    """Runs function(rank, num_processes, *args) in as many fresh processes; returns rank 0's figure."""
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        figures = [pool.submit(function, rank, num_processes, *args) for rank in range(num_processes)]
        return figures[0].result()


def bare_rate(case: Case, num_workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return in_processes(bare_loop, num_workers, case, f"{folder}/meeting")


def add_options(parser: Parser) -> None:
    """What this benchmark and peers.py take."""
    parser.add_argument("--data", help="a prepared data set (default: drawn shapes)")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="these networks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-skipped", type=int, default=4, help="first steps, which are not timed (default 4)")
    parser.add_argument("--num-steps", type=int, default=20, help="steps that are timed (default 20)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    add_training_options(parser)


def case_of(args: Any, model: str, folder: str) -> Case:
    """The case that the options ask for."""
    if min(args.num_skipped, args.num_steps) < 1:
        raise UserError("--num-skipped and --num-steps must be 1 or more")
    case = Case(model, args.data, args.num_skipped, args.num_steps, given_settings(args))
    num_needed = (args.num_skipped + args.num_steps + 1) * case.batch_size
    if args.data is None:  # images of 32 px, as CIFAR-10's; some are held out for validation
        case = replace(case, data=f"{folder}/{model}")
        datasets.prepare(sources.shapes(num_needed + 100, 20), case.data)
    elif (num_rows := manifest.read_manifest(args.data).num_rows("train")) * 0.99 < num_needed:
        raise UserError(f"so many steps need {num_needed} images, {args.data} has {num_rows}; lower --num-steps")
    return case


def result_of(case: Case, num_workers: int, rounds: Rounds) -> dict[str, Any]:
    rates = {way: summary(r[way] for r in rounds) for way in rounds[0]}
    about = {"model": case.model, "num_workers": num_workers, "batch_size": case.batch_size}
    about |= {"num_skipped": case.num_skipped, "num_steps": case.num_steps, "overrides": case.overrides}
    return {**about, "images_per_second": rates, "job_over_bare": ratio(rounds, "job", "bare"), "rounds": rounds}


def options() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default 1 2)")
    add_options(parser)
    return parser


def main(args: Any) -> None:
    prepare_environment()  # the bare loop's processes keep freed memory as the job's do
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.only:
            case = case_of(args, model, folder)
            for n in args.workers:
                print(f"{model}, {n} workers", flush=True)
                ways = {"job": lambda c=case, n=n: job_rate(c, n), "bare": lambda c=case, n=n: bare_rate(c, n)}
                results.append(result_of(case, n, measure(ways, args.rounds)))
    rows = [
        (
            f"{r['model']}, {r['num_workers']} workers, batch {r['batch_size']}",
            *(cell(r["images_per_second"][way], 1) for way in ("job", "bare")),
            cell(r["job_over_bare"], 3),
        )
        for r in results
    ]
    print(table(("", "job, images/s", "bare loop, images/s", "job / bare"), rows))
    print(store("job", results, args.out))


if __name__ == "__main__":
    given = options().parse_args()
    sys.exit(exit_code_of(lambda: main(given), given.debug))
