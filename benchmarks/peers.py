"""The job beside its peers: images/s of one network at one batch size in jobs/train.py, in Keras and in plain PyTorch.

    python benchmarks/peers.py [--data URI] [--only fan resnet50v2] [--ways WAY ...] [--rounds N] [--num-steps N]

- job: jobs/train.py with one worker at its defaults, Ray, DALI's input and logging included; and with --precision fp32.
- Keras: keras_peer.py, the deck's own stack on TensorFlow, from decoded images in memory, which spares it what the
  others do; and with the policy mixed_bfloat16.
- PyTorch: what a tutorial writes: fp32, eager, Adam, the whole model in training mode, the base's parameters without
  gradient, Pillow, torchvision and a DataLoader with a process per core; and with the frozen base's BatchNorm in
  inference mode, as in Keras and the job.

Each is a process of its own on all cores. images/s are wall clock over --num-steps steps after --num-skipped: start-up,
tracing and validation are outside. Settings of jobs/train.py are options here too; peers follow --global-batch-size and
--image-size. Keras needs uv, which makes its environment.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Case, add_options, case_of, decoded_images, in_processes, job_rate
from PIL import Image
from side_by_side import cell, measure, ratio, store, summary, table
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cifar_dist.command_line import Parser
from cifar_dist.config import DataConfig
from cifar_dist.errors import UserError, exit_code_of

sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))

from keras_run import outside, script_command

from cifar_dist.data import manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet

KERAS = Path(__file__).with_name("keras_peer.py")
JOB, JOB_FP32, EVAL_BASE = "job", "job, fp32", "PyTorch, base in eval mode"
WAYS = (JOB, JOB_FP32, "Keras", "Keras, bf16", "PyTorch", EVAL_BASE)


class Images(Dataset):
    """Encoded images, decoded, resized and flipped one by one as the recipe says; the deck does not flip for Fan."""

    def __init__(self, uri: str, config: DataConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.staged = DataSet.open(uri, Staging(folder=folder)).stage("train")
        resize = [v2.Resize(config.image_size)] if config.image_size != 32 else []
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if config.flips == "both" else []
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
        self.transform = v2.Compose([v2.ToImage(), *resize, *flips, *to_float])

    def __len__(self) -> int:
        return len(self.staged)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.staged.encoded(i).tobytes())).convert("RGB")
        return self.transform(image), int(self.staged.labels[i])


def plain_fan(num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, rate in zip((32, 64, 128, 128, 256, 256, 512), (0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0), strict=True):
        layers += [nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(rate)]
        channels = width
    layers.append(nn.Flatten())
    channels *= 18 * 18
    for units in (512, 128):
        layers += [nn.Linear(channels, units), nn.BatchNorm1d(units), nn.ReLU()]
        channels = units
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


class Block(nn.Module):
    """ResNet50V2's bottleneck."""

    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.project = project
        self.preact = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.shortcut = nn.Conv2d(channels, 4 * width, 1) if project else nn.MaxPool2d(1, stride)
        self.residual = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, 4 * width, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.preact(x)
        return self.residual(y) + self.shortcut(y if self.project else x)


def plain_resnet50v2(num_classes: int) -> nn.Module:
    """[base, head], the base's parameters without gradient."""
    base: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)]
    channels = 64
    for width, num_blocks, stride in ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 1)):
        for i in range(num_blocks):
            base.append(Block(channels, width, stride if i == num_blocks - 1 else 1, i == 0))
            channels = 4 * width
    base += [nn.BatchNorm2d(channels), nn.ReLU()]
    head: list[nn.Module] = [nn.Conv2d(channels, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    channels = 128
    for units in (512, 256, 128):
        head += [nn.Linear(channels, units), nn.BatchNorm1d(units), nn.Dropout(0.1), nn.ReLU()]
        channels = units
    model = nn.Sequential(nn.Sequential(*base), nn.Sequential(*head, nn.Linear(channels, num_classes)))
    for parameter in model[0].parameters():
        parameter.requires_grad = False
    return model


PLAIN: dict[str, Callable[[int], nn.Module]] = {"fan": plain_fan, "resnet50v2": plain_resnet50v2}


def plain_loop(_rank: int, _num_processes: int, case: Case, eval_base: bool) -> float:
    """images/s of the tutorial's script."""
    num_workers = os.cpu_count() or 1
    torch.set_num_threads(num_workers)
    dataset = Images(case.data, case.config.data)
    loader = DataLoader(
        *(dataset, case.batch_size, True), num_workers=num_workers, drop_last=True, multiprocessing_context="fork"
    )
    model = PLAIN[case.model](manifest.read_manifest(case.data).num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    model.train()
    if eval_base:
        model[0].eval()  # type: ignore[index]
    ends, running_loss = [], 0.0
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        ends.append(time.perf_counter())
        if len(ends) == case.num_skipped + case.num_steps:
            return case.num_steps * case.batch_size / (ends[-1] - ends[case.num_skipped - 1])
    raise AssertionError


def keras_command() -> list[str]:
    """What runs keras_peer.py in its environment, which is made first. Raises UserError if it cannot be."""
    try:
        return script_command(KERAS)
    except UserError as error:
        raise UserError(f"{error}; mend that, or leave Keras out by --ways") from error


def keras_rate(case: Case, command: list[str], images: Path, *more: str) -> float:
    words = [*command, "--images", str(images), "--model", case.model, *more]
    words += ["--image-size", str(case.config.data.image_size), "--batch-size", str(case.batch_size)]
    words += ["--num-skipped", str(case.num_skipped), "--num-steps", str(case.num_steps)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, env=outside())
    if done.returncode:
        raise RuntimeError(f"{KERAS.name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])["images_per_second"]


def ways_of(case: Case, names: tuple[str, ...], folder: Path) -> dict[str, Callable[[], float]]:
    """Way -> what measures it."""
    made: dict[str, Callable[[], float]] = {
        JOB: lambda: job_rate(case, 1),
        JOB_FP32: lambda: job_rate(case, 1, precision="fp32"),
        "PyTorch": lambda: in_processes(plain_loop, 1, case, False),
    }
    if case.model == "resnet50v2":
        made[EVAL_BASE] = lambda: in_processes(plain_loop, 1, case, True)
    if any(name.startswith("Keras") for name in names):
        command, file = keras_command(), folder / f"{case.model}.npz"
        num_images = (case.num_skipped + case.num_steps) * case.batch_size
        images, labels = decoded_images(case.data, num_images)
        np.savez(file, images=images, labels=labels)
        made["Keras"] = lambda: keras_rate(case, command, file)
        made["Keras, bf16"] = lambda: keras_rate(case, command, file, "--policy", "mixed_bfloat16")
    return {name: made[name] for name in names if name in made}


def options() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="these ways; the job is always there")
    add_options(parser)
    return parser


def main(args: Any) -> None:
    names = tuple(name for name in WAYS if name == JOB or name in args.ways)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.only:
            case = case_of(args, model, folder)
            print(f"{model}, batch {case.batch_size}", flush=True)
            rounds = measure(ways_of(case, names, Path(folder)), args.rounds)
            for way in rounds[0]:
                ratios = {f"{job} over it": ratio(rounds, job, way) for job in (JOB, JOB_FP32) if job in rounds[0]}
                about = {**asdict(case), "data": args.data or "drawn shapes", "batch_size": case.batch_size}
                rate = summary(r[way] for r in rounds)
                results.append({**about, "way": way, "images_per_second": rate, **ratios})
    rows = [
        (
            f"{r['model']}, batch {r['batch_size']}: {r['way']}",
            cell(r["images_per_second"], 1),
            *(cell(r[f"{job} over it"]) if f"{job} over it" in r else "" for job in (JOB, JOB_FP32)),
        )
        for r in results
    ]
    print(table(("", "images/s", "job / it", "job, fp32 / it"), rows))
    print(store("peers", results, args.out))


if __name__ == "__main__":
    given = options().parse_args()
    sys.exit(exit_code_of(lambda: main(given), given.debug))
