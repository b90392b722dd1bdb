"""What one GPU reaches with this project's own code: training beside a floor, input, checkpoints, validation.

    python benchmarks/gpu_suite.py [--data DATA] [--minutes 9] [--sections NAME ...]

Runs without Ray; what it calls is what a worker calls. A section that fails is reported, the others go on, and the
exit code is then 1. The result file is written after each section.

limits: the best rate of square bf16 matrix products on random data, and of copying (2 bytes moved per byte) and of
  adding a scaled vector (3).
fan-BATCH, resnet50v2-frozen, resnet50v2-finetuned: images/s of `train_epoch` over the loader's batches, with one CUDA
  graph and without, and of the floor: a hand-written loop in plain PyTorch (gpu_floor.py). Wall clock over --num-steps
  steps, by turns; the first turn, which compiles, is not counted.
input: images/s of the loader alone, with the decoded images on the device and with DALI's `mixed` decoder.
ranks: fan with DistributedDataParallel and NCCL (one rank) over fan without.
checkpoint: the seconds that storing fan's state takes from training, and those until it is on the disk.
evaluation: images/s of `validate` in fp32 and bf16, by batch size.
"""

import gc
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # from a checkout that is not installed too

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_floor import Floor  # noqa: E402
from side_by_side import RESULTS, cell, measure, ratio, store, summary, table  # noqa: E402

from cifar_dist.command_line import Parser  # noqa: E402
from cifar_dist.cpus import num_cpus  # noqa: E402
from cifar_dist.data import sources  # noqa: E402
from cifar_dist.data import store as datasets  # noqa: E402
from cifar_dist.data.order import eval_plans  # noqa: E402
from cifar_dist.data.private import Staging  # noqa: E402
from cifar_dist.data.staged import DataSet  # noqa: E402
from cifar_dist.errors import UserError, exit_code_of  # noqa: E402
from cifar_dist.job_settings import Launch  # noqa: E402
from cifar_dist.recipes import recipe_config  # noqa: E402
from cifar_dist.run.checkpoint import Cursor  # noqa: E402
from cifar_dist.run.folder import Run  # noqa: E402
from cifar_dist.run.network import Precision  # noqa: E402
from cifar_dist.train import assemble, rank_state  # noqa: E402
from cifar_dist.train.communication import parallel  # noqa: E402
from cifar_dist.train.job import Job, Plan, StartUp  # noqa: E402
from cifar_dist.train.loop import train_epoch, validate  # noqa: E402
from cifar_dist.train.saver import Saver  # noqa: E402
from cifar_dist.train.step import Step  # noqa: E402

DRIVER = "0" * 32  # a driver's id, which must be hexadecimal
EPOCH_IMAGES = 45_000  # CIFAR-10's train split without the validation images
SHAPES = 6000, 100  # drawn for train and test without --data


class Skipped(Exception):
    """A section that cannot run here, and why."""


@dataclass
class Suite:
    """The options, and what the sections have found so far."""

    args: Namespace
    device: torch.device
    data: str
    folder: Path
    start: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds_per_call(self, call: Callable[[], object]) -> float:
        """The mean of as many calls as fit into --seconds."""
        once = timed(call, 1, self.device)
        return timed(call, max(1, min(round(self.args.seconds / max(once, 1e-6)), 2000)), self.device)

    def compare(self, calls: dict[str, Callable[[], object]]) -> list[dict[str, float]]:
        """Seconds per call of each way, by turns, --rounds times."""
        ways = {name: lambda call=call: self.seconds_per_call(call) for name, call in calls.items()}
        return measure(ways, self.args.rounds)

    def add_rates(self, what: str, rounds: list[dict[str, float]], base: str = "") -> dict[str, Any]:
        """Lines of the table, from images/s by way; `base`: the way that the ratios are over."""
        found: dict[str, Any] = {"images_per_second": {way: summary(r[way] for r in rounds) for way in rounds[0]}}
        if base:
            found["ratio"] = {way: ratio(rounds, way, base) for way in rounds[0] if way != base}
        for way, rate in found["images_per_second"].items():
            epoch = f"{EPOCH_IMAGES / rate['median']:.2f}"
            over = cell(found["ratio"][way]) if base and way != base else ""
            self.rows.append((f"{what}: {way}", cell(rate, 0), epoch, over))
        return found


def timed(call: Callable[[], object], num_calls: int, device: torch.device) -> float:
    """Seconds per call: the device's own clock on a GPU."""
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        first.record()
        for _ in range(num_calls):
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / num_calls
    start = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - start) / num_calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# The device's limits


def limits(suite: Suite) -> dict[str, Any]:
    """Best bf16 matrix rate in FLOP/s and best memory bandwidth in bytes/s."""
    device = suite.device
    calls: dict[str, Callable[[], object]] = {}
    work: dict[str, float] = {}
    for size in suite.args.matrix_sizes:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        calls[f"product of {size}"] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        work[f"product of {size}"] = 2.0 * size**3
    num = (suite.args.copy_mib << 20) // 4
    x, y, z = (torch.randn(num, device=device) for _ in range(3))
    calls["copy"], work["copy"] = lambda: y.copy_(x), 8.0 * num
    calls["scaled sum"], work["scaled sum"] = lambda: torch.add(x, y, alpha=0.5, out=z), 12.0 * num
    for call in calls.values():
        call()
    rounds = suite.compare(calls)
    rates = {name: summary(work[name] / r[name] for r in rounds) for name in calls}
    for name, rate in rates.items():
        suite.rows.append((name, cell({k: v if k == "n" else v / 1e12 for k, v in rate.items()}), "", ""))
    medians = {name: rate["median"] for name, rate in rates.items()}
    return {
        "flops_per_second": max(v for name, v in medians.items() if name.startswith("product")),
        "bytes_per_second": max(medians["copy"], medians["scaled sum"]),
        "rates": rates,
    }


# Training


@dataclass(frozen=True)
class Case:
    """A recipe's network at a batch size."""

    recipe: str
    batch_size: int
    image_size: int

    @property
    def settings(self) -> dict[str, Any]:
        return {"global_batch_size": self.batch_size, "image_size": self.image_size, "epochs": 10_000}


class Rank:
    """What a worker assembles, without Ray."""

    def __init__(self, suite: Suite, case: Case, *, ranks: bool = False, **settings: Any) -> None:
        self.suite = suite
        launch = Launch(recipe=case.recipe, data=suite.data, storage=str(suite.folder), name="suite")
        staging = Staging(folder=str(suite.folder))
        self.plan = Plan(
            config=recipe_config(case.recipe, **case.settings, **settings),
            launch=launch,
            run=Run(launch.run_uri),
            data=DataSet.open(suite.data, staging),
            weights=None,
            card={},
            is_finished=False,
        )
        job = Job(
            plan=self.plan,
            driver=DRIVER,
            attempt=1,
            progress=SimpleNamespace(say=SimpleNamespace(remote=print)),
            start_up=StartUp(),
            num_cpus_per_worker=num_cpus(),
            git_commit="",
            limit_seconds=600,
        )
        self.state, self.images = assemble.assemble(job, suite.device, rank=0, world=1, local_world=1)
        assemble.split_base(self.state, self.images, SimpleNamespace(say=print))  # type: ignore[arg-type]
        assemble.wrap(self.state, len(self.images.train_ids))
        if ranks:
            wrapped = parallel(self.state.trainable, suite.device, self.state.config.loop.gradient_dtype)
            self.state.trainable, self.state.communication = wrapped
        self.step = Step(self.state)

    def rate(self) -> float:
        """images/s of the first --num-steps steps of an epoch, or of its steps where it has fewer."""
        state = self.state
        batches = islice(self.images.train_batches(state.cursor), self.suite.args.num_steps)
        synchronize(self.suite.device)
        start = time.perf_counter()
        clock = train_epoch(self.step, batches, lambda _clock: None)
        synchronize(self.suite.device)
        seconds = time.perf_counter() - start
        state.cursor = Cursor(state.cursor.epoch + 1, 0)
        return clock.num_images / seconds


def floor_rate(suite: Suite, floor: Floor) -> float:
    synchronize(suite.device)
    start = time.perf_counter()
    for _ in range(suite.args.num_steps):
        floor()
    synchronize(suite.device)
    return suite.args.num_steps * floor.batch_size / (time.perf_counter() - start)


def training(suite: Suite, case: Case) -> dict[str, Any]:
    """images/s of the product and of the floor, and the product over the floor."""
    before = time.perf_counter()
    plain = Rank(suite, case, cuda_graph="off")
    plain.rate()
    first_seconds = time.perf_counter() - before
    ways: dict[str, Callable[[], float]] = {"train_epoch": plain.rate}
    if suite.cuda:
        ways["train_epoch, one graph"] = Rank(suite, case, cuda_graph="auto").rate
    model = plain.state.config.model
    if suite.cuda and not model.finetune and model.model == "resnet50v2":
        images = min(20 * case.batch_size, len(plain.images.train_ids))
        kept: dict[str, Any] = {"features": "cached", "flips": "none", "train_images": images}
        ways["train_epoch, features kept"] = Rank(suite, case, **kept).rate
    size = plain.state.config.data.image_size
    options: dict[str, Any] = {"batch_size": case.batch_size, "image_size": size, "finetune": model.finetune}
    floor = Floor(model.model, **options, device=suite.device)
    ways["floor"] = lambda: floor_rate(suite, floor)
    for way in ways.values():
        way()
    found = suite.add_rates(f"{case.recipe} {case.batch_size}", measure(ways, suite.args.rounds), "floor")
    if suite.cuda:
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated(suite.device) >> 20
    return {**found, "seconds_to_first_turn": round(first_seconds, 1), "num_steps": suite.args.num_steps}


# The parts


def loader_rate(suite: Suite, cache: str) -> Callable[[], float]:
    rank_case = Case("deck_fan", suite.args.input_batch, 32)
    rank = Rank(suite, rank_case, cache=cache, compile="off", cuda_graph="off")

    def rate() -> float:
        num_images, start = 0, time.perf_counter()
        for batch in islice(rank.images.train_batches(rank.state.cursor), suite.args.num_steps):
            num_images += len(batch.labels)
        synchronize(suite.device)
        return num_images / (time.perf_counter() - start)

    return rate


def inputs(suite: Suite) -> dict[str, Any]:
    names = {"decoded": "decoded, on the device" if suite.cuda else "decoded", "encoded": "encoded"}
    ways = {name: loader_rate(suite, cache) for cache, name in names.items()}
    return suite.add_rates(f"input, {suite.args.input_batch}", measure(ways, suite.args.rounds, warm_up=True))


def ranks(suite: Suite) -> dict[str, Any]:
    case = Case("deck_fan", suite.args.fan_batches[-1], 32)
    backend = "nccl" if suite.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{suite.folder}/meeting", rank=0, world_size=1)
    try:
        ways = {
            "alone": Rank(suite, case, cuda_graph="off").rate,
            "DistributedDataParallel": Rank(suite, case, ranks=True, cuda_graph="off").rate,
        }
        rounds = measure(ways, suite.args.rounds, warm_up=True)
    finally:
        dist.destroy_process_group()
    return suite.add_rates(f"one rank over {backend}", rounds, "alone")


def checkpoint(suite: Suite) -> dict[str, Any]:
    """Seconds for fan's state, of which `stall` is what training waits; on the local disk."""
    rank = Rank(suite, Case("deck_fan", suite.args.fan_batches[-1], 32), compile="off", cuda_graph="off")
    rank.rate()  # the optimizer has its state
    number = rank.plan.run.attempts(DRIVER).claim(takeover=True)
    saver = Saver(rank.plan.run, DRIVER, number, device=suite.device, global_step=0, mark=None, num_kept=1)
    rounds: list[dict[str, float]] = []
    for i in range(suite.args.rounds):
        state, before = rank.state, saver.stall_seconds
        synchronize(suite.device)
        start = time.perf_counter()
        meta = {**rank_state.checkpoint_meta(state, state.totals.tolist(), None), "model": "fan"}
        saver.save(Cursor(0, i + 1), rank_state.checkpoint_state(state, rank_state.gather_rows(state)), meta)
        saver.wait()
        rounds.append({"stall": saver.stall_seconds - before, "stored": time.perf_counter() - start})
    saver.close()
    found = {way: summary(r[way] for r in rounds) for way in rounds[0]}
    suite.rows += [(f"checkpoint: {way} (s)", cell(found[way], 3), "", "") for way in found]
    return {"seconds": found}


def evaluation(suite: Suite) -> dict[str, Any]:
    found = {}
    for case in (Case("deck_fan", 64, 32), Case("deck_resnet50v2", 64, suite.args.image_size)):
        rank = Rank(suite, case, compile="off", cuda_graph="off")
        ways = {}
        for precision in ("fp32", "bf16"):
            for batch_size in suite.args.eval_batches:
                ways[f"{precision}, {batch_size}"] = validation_rate(suite, rank, precision, batch_size)
        found[case.recipe] = suite.add_rates(f"validate, {case.recipe}", measure(ways, suite.args.rounds, warm_up=True))
    return found


def validation_rate(suite: Suite, rank: Rank, precision: str, batch_size: int) -> Callable[[], float]:
    model, loader = rank.state.model, rank.images.loader
    resolved = Precision(precision, suite.device)

    def rate() -> float:
        ids = rank.images.train_ids[: suite.args.eval_images]
        start = time.perf_counter()
        totals = validate(model, loader.batches(eval_plans(ids, batch_size, 0, 1)), resolved)
        return totals[2].item() / (time.perf_counter() - start)

    return rate


# All of it


def sections(args: Namespace) -> dict[str, Callable[[Suite], dict[str, Any]]]:
    """What to run, the most wanted first."""
    fans = {f"fan-{b}": Case("deck_fan", b, 32) for b in args.fan_batches}
    resnets = {
        "resnet50v2-frozen": Case("deck_resnet50v2", args.resnet_batch, args.image_size),
        "resnet50v2-finetuned": Case("finetune_resnet50v2", args.resnet_batch, args.image_size),
    }
    parts = {"input": inputs, "ranks": ranks, "checkpoint": checkpoint, "evaluation": evaluation}
    trained = {name: lambda suite, case=case: training(suite, case) for name, case in (fans | resnets).items()}
    last = trained.pop("resnet50v2-finetuned")  # it compiles for more than a minute
    return {"limits": limits, **trained, **parts, "resnet50v2-finetuned": last}


HEADER = ("what", "TFLOP/s, TB/s or images/s", "s/epoch", "over the first or the floor")


def run_section(suite: Suite, name: str, run: Callable[[Suite], dict[str, Any]]) -> dict[str, Any]:
    """What the section found, why it was left out, or its error."""
    left = 60 * suite.args.minutes - (time.monotonic() - suite.start)
    kind = name.split("-", maxsplit=1)[0]
    like = [found["section_seconds"] for other, found in suite.found.items() if other.startswith(kind)]
    start = time.monotonic()
    try:
        if left < max([3 * suite.args.minutes, *like]):
            raise Skipped(f"{max(left, 0):.0f} s were left")
        outcome: dict[str, Any] = {"result": run(suite)}
    except Skipped as reason:
        outcome = {"skipped": str(reason)}
        print(f"skipped: {reason}", flush=True)
    except Exception as error:  # whatever it is, the other sections must still run
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    torch.compiler.reset()  # the next section's shapes are new ones, not a reason to make shapes dynamic
    if suite.cuda:
        torch.cuda.empty_cache()
    return {**outcome, "section_seconds": round(time.monotonic() - start, 1)}


def main(args: Namespace) -> None:
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --device cpu runs the same on a CPU, with small sizes")
    torch.manual_seed(0)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        data = args.data
        if not data:
            data = f"{folder}/shapes"
            datasets.prepare(sources.shapes(*args.shapes), data)
        run_all(Suite(args, device, data, Path(folder)))


def run_all(suite: Suite) -> None:
    args = suite.args
    for name, run in sections(args).items():
        if not args.sections or name in args.sections or name.split("-")[0] in args.sections:
            print(f"{name}:", flush=True)
            suite.found[name] = run_section(suite, name, run)
            target = store("gpu_suite", suite.found, args.out)
    if not suite.found:
        raise UserError(f"no section is named {', '.join(args.sections)}; there are {', '.join(sections(args))}")
    print(table(HEADER, suite.rows))
    print(target)
    if failed := [f"{name} ({found['error']})" for name, found in suite.found.items() if "error" in found]:
        raise UserError(f"these sections failed, see above: {'; '.join(failed)}")


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--minutes", type=float, default=9, help="no section is begun near the end of these (default 9)")
    p.add_argument("--sections", nargs="+", default=[], help="only these (default all); `fan` means all of its batches")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=0.3, help="of each measurement of the limits (default 0.3)")
    p.add_argument("--num-steps", type=int, default=80, help="of each measurement of training (default 80)")
    p.add_argument("--matrix-sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    p.add_argument("--copy-mib", type=int, default=2048, help="size of a vector for the bandwidth (default 2048)")
    p.add_argument("--fan-batches", type=int, nargs="+", default=[512, 64])
    p.add_argument("--resnet-batch", type=int, default=256)
    p.add_argument("--image-size", type=int, default=224, help="resnet50v2's, in pixels (default 224)")
    p.add_argument("--input-batch", type=int, default=512)
    p.add_argument("--eval-batches", type=int, nargs="+", default=[100, 1000])
    p.add_argument("--eval-images", type=int, default=5000)
    p.add_argument("--data", default="", help="a prepared data set (default: drawn shapes)")
    p.add_argument("--shapes", type=int, nargs=2, default=SHAPES, help="images drawn without --data")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return p


if __name__ == "__main__":
    options = parser().parse_args()
    sys.exit(exit_code_of(lambda: main(options), options.debug))
