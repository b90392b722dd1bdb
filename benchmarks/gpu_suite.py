"""What one GPU reaches: its own limits, both networks, the input, and a short training to an accuracy.

    python benchmarks/gpu_suite.py [--minutes 10] [--data DATA] [--sections NAME ...]

Runs without Ray. Sections that need DALI or pyarrow say so where they are missing and are left out, as are those for
which no time is left; a section that fails is reported, the others go on, and the exit code is then 1. The result file
is written after each section.

limits: the best rate of square bf16 matrix products of several sizes on random data, and of copying (2 bytes moved per
  byte) and of adding a scaled vector (3). All shares below are of these.
fan-BATCH, resnet-frozen, resnet-finetuned: one training step (forward in bf16, loss, backward, fused Adam) on one
  random batch that is there already; resnet-forward: the frozen base alone. Each runs as it is (eager), compiled, and
  both once more captured as one CUDA graph. `rate` is the share of the matrix rate, from the operations that PyTorch
  counts in the step; `bandwidth` that of the memory bandwidth, from the bytes that must move at the least: input and
  output of each convolution and Dense once per product that it takes part in, weights, gradients and Adam's state;
  what lies between is taken to be fused. Memory is the most that was allocated for the step and what it needs.
decode: 32-px JPEG to normalized float batches on the device: DALI's `mixed` decoder, its CPU decoder and a copy, and
  decoded images that lie on the device, flipped and normalized there.
feed: Fan's fastest step fed from the device's decoded images and by this project's loader, against the same step on
  one batch: what is lost is the input's share.
training: Fan from `--data` (a prepared data set, a .npz with train_images, train_labels, test_images and test_labels, a
  .tar of train/CLASS/IMAGE and test/CLASS/IMAGE; default: drawn shapes) in bf16 with Adam, a triangular rate and
  horizontal flips until `--target-accuracy` on the test images or `--epochs`. Seconds are those of training steps;
  start-up, warm-up and the tests between epochs are not in them.

CUDA events time calls that follow each other for `--seconds`, host gaps included; ways are measured by turns, and
reported as median, least and most over `--rounds`. On a CPU (--device cpu) the same code runs without graphs.
"""

import gc
import importlib.util
import io
import statistics
import sys
import tarfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # from a checkout that is not installed too

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from side_by_side import RESULTS, cell, measure, ratio, store, summary, table  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from cifar_dist import models  # noqa: E402
from cifar_dist.command_line import Parser  # noqa: E402
from cifar_dist.errors import UserError, exit_code_of  # noqa: E402
from cifar_dist.models.frozen import FrozenBase, split_frozen  # noqa: E402

EPOCH_IMAGES = 50_000
WAYS = ("eager", "compiled", "eager graph", "compiled graph")
WARM_UP_STEPS = 3
SHAPES_TRAIN, SHAPES_TEST = 5000, 1000


class Skipped(Exception):
    """A section that cannot run here, and why."""


@dataclass
class Suite:
    """The options, and what the sections have found so far."""

    args: Namespace
    device: torch.device
    start: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def ways(self) -> list[str]:
        return [way for way in self.args.ways if self.cuda or "graph" not in way]

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.cuda else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        # Without the cache: casts made outside a graph's capture must not be looked up inside.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def add_row(
        self,
        what: str,
        milliseconds: dict[str, float] | None = None,
        batch_size: int = 0,
        *,
        text: str = "",
        shares: list[str] | None = None,
        memory: str = "",
    ) -> None:
        """A line of the table; images/s and s/epoch follow from the median time of a batch."""
        time_cells = ["", "", ""]
        if milliseconds:
            speed = 1000 * batch_size / milliseconds["median"]
            time_cells = [cell(milliseconds, 3), f"{speed:,.0f}", f"{EPOCH_IMAGES / speed:.2f}"]
        self.rows.append((what, text, *time_cells, *(shares or ["", ""]), memory))

    def images(self, num: int, size: int) -> torch.Tensor:
        return torch.rand(num, 3, size, size, device=self.device).to(memory_format=self.layout)

    def seconds_per_call(self, call: Callable[[], object]) -> float:
        """The mean of as many calls as fit into --seconds."""
        once = timed(call, 1, self.device)
        return timed(call, max(1, min(round(self.args.seconds / max(once, 1e-6)), 2000)), self.device)

    def compare(self, calls: dict[str, Callable[[], object]]) -> list[dict[str, float]]:
        """Seconds per call of each way, by turns, --rounds times."""
        ways = {name: lambda call=call: self.seconds_per_call(call) for name, call in calls.items()}
        return measure(ways, self.args.rounds)


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
        suite.add_row(name, text=cell({k: v if k == "n" else v / 1e12 for k, v in rate.items()}))
    medians = {name: rate["median"] for name, rate in rates.items()}
    return {
        "flops_per_second": max(v for name, v in medians.items() if name.startswith("product")),
        "bytes_per_second": max(medians["copy"], medians["scaled sum"]),
        "rates": rates,
    }


# The networks


def adam(model: nn.Module, device: torch.device, learning_rate: float = 1e-3) -> torch.optim.Adam:
    """Fused, and on a GPU such that a graph can be captured: the rate is then a tensor that later steps read."""
    trained = [p for p in model.parameters() if p.requires_grad]
    cuda = device.type == "cuda"
    rate: Any = torch.tensor(learning_rate, device=device) if cuda else learning_rate
    return torch.optim.Adam(trained, rate, eps=1e-7, fused=True, capturable=cuda)


def training_step(
    suite: Suite,
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Callable[[], torch.Tensor]:
    """A function that does one step on what `batch` gives, and returns the loss."""
    model.train()

    def step() -> torch.Tensor:
        images, labels = batch()
        with suite.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()  # not the loss: it would keep the backward graph and its streams alive

    return step


def captured(step: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """The step as one CUDA graph, whose tensors stay where they are; each call writes the tensor that it returns."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # allocates what a first step allocates, in the stream of the capture
        for _ in range(WARM_UP_STEPS):
            step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def compiled(forward: Any, way: str) -> Any:
    return torch.compile(forward, fullgraph=True, dynamic=False) if way.startswith("compiled") else forward


def ready(suite: Suite, step: Callable[[], torch.Tensor], way: str) -> Callable[[], torch.Tensor]:
    """The step after its warm-up, as a graph if the way says so."""
    if "graph" in way:
        return captured(step, suite.device)
    for _ in range(WARM_UP_STEPS):
        step()
    return step


def num_operations(step: Callable[[], object]) -> int:
    """Floating-point operations of one call: matrix products and convolutions, a multiply-add being two."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def least_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that one step moves at the least in bf16, with fp32 weights where they train."""
    total = 0

    def count(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        trains = module.weight.requires_grad
        products = 1 + trains + (trains and inputs[0].requires_grad)  # of outputs, weight gradients, input gradients
        total += products * 2 * (inputs[0].numel() + output.numel())

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        # cast (read 4, write 2), read twice (2 + 2), gradient (2 + 2 + 4), Adam (read 16, write 12)
        total += p.numel() * (46 if p.requires_grad else 2)
    return total


@dataclass(frozen=True)
class Case:
    """A network at a batch size, and what of it runs: a training step, or (`forward_only`) the frozen base."""

    name: str
    batch_size: int
    image_size: int
    finetune: bool = False
    forward_only: bool = False

    def __str__(self) -> str:
        frozen = " base, forward" if self.forward_only else " frozen"
        kind = "" if self.name == "fan" else " finetuned" if self.finetune else frozen
        return f"{self.name}{kind} {self.batch_size}"

    def parts(self, suite: Suite) -> tuple[FrozenBase | None, nn.Module]:
        """The frozen base as a run has it (folded, bf16, in inference mode) and what is trained; no base, the whole."""
        model = models.build(self.name, finetune=self.finetune).to(suite.device).to(memory_format=suite.layout)
        return split_frozen(model, torch.bfloat16)

    def step(self, suite: Suite, way: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        base, trained = self.parts(suite)
        if base and way.startswith("compiled"):
            base.compile()
        if self.forward_only:
            assert base
            return lambda: base(images)
        forward = compiled(trained, way)
        optimizer = adam(trained, suite.device)
        return training_step(suite, trained, forward, optimizer, lambda: (base(images) if base else images, labels))

    def work(self, suite: Suite, images: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
        """(floating-point operations, least bytes) of one step."""
        base, trained = self.parts(suite)
        with suite.autocast():
            bytes_moved = least_bytes(base.base, lambda: base(images)) if base else 0
            if not self.forward_only:
                features = base(images) if base else images
                bytes_moved += least_bytes(trained, lambda: trained(features))
        return num_operations(self.step(suite, "eager", images, labels)), bytes_moved


def network(suite: Suite, case: Case) -> dict[str, Any]:
    """ms per step, images/s, shares and memory of each way."""
    device, batch_size = suite.device, case.batch_size
    images = suite.images(batch_size, case.image_size)
    labels = torch.randint(10, (batch_size,), device=device)
    operations, bytes_moved = case.work(suite, images, labels)
    calls: dict[str, Callable[[], object]] = {}
    about: dict[str, dict[str, float]] = {}
    for way in suite.ways:
        gc.collect()
        before = torch.cuda.memory_allocated(device) if suite.cuda else 0
        if suite.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        calls[way] = ready(suite, case.step(suite, way, images, labels), way)
        synchronize(device)
        about[way] = {"start_up_seconds": round(time.perf_counter() - start, 2)}
        if suite.cuda:
            about[way]["peak_memory_mib"] = round((torch.cuda.max_memory_allocated(device) - before) / (1 << 20), 1)
    rounds = suite.compare(calls)
    top = suite.found.get("limits", {}).get("result")
    ways: dict[str, Any] = {}
    for way in calls:
        seconds = [r[way] for r in rounds]
        ways[way] = {
            "ms_per_step": summary(1000 * s for s in seconds),
            "images_per_second": summary(batch_size / s for s in seconds),
            "seconds_per_epoch": summary(EPOCH_IMAGES / batch_size * s for s in seconds),
            **about[way],
        }
        if "eager" in calls:
            ways[way]["speed_up_over_eager"] = ratio(rounds, way, "eager", inverse=True)
        shares = []
        if top:
            of_rate, of_bandwidth = operations / top["flops_per_second"], bytes_moved / top["bytes_per_second"]
            ways[way]["share_of_matrix_rate"] = summary(of_rate / s for s in seconds)
            ways[way]["share_of_bandwidth"] = summary(of_bandwidth / s for s in seconds)
            shares = [f"{ways[way][f'share_of_{k}']['median']:.1%}" for k in ("matrix_rate", "bandwidth")]
        suite.add_row(
            f"{case}, {way}",
            ways[way]["ms_per_step"],
            batch_size,
            shares=shares,
            memory=f"{about[way]['peak_memory_mib']:,.0f}" if suite.cuda else "",
        )
    return {
        "batch_size": batch_size,
        "image_size": case.image_size,
        "gflop_per_image": operations / batch_size / 1e9,
        "least_mb_per_step": bytes_moved / 1e6,
        "ways": ways,
        "note": "" if suite.cuda else "CUDA graphs need CUDA",
    }


# The input


def need(*packages: str) -> None:
    """Raises Skipped where a package is missing. DALI is looked for by its module."""
    for name in packages:
        try:
            there = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # its parent
            there = None
        if there is None:
            raise Skipped(f"it needs {name}, which is not installed")


def jpegs(num: int) -> list[np.ndarray]:
    """Encoded 32-px images (uint8 [num_bytes] each): smooth noise, of about a photograph's size."""
    need("PIL")
    from PIL import Image  # noqa: PLC0415

    random = np.random.default_rng(0)
    found = []
    for _ in range(num):
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return found


def device_batch(pixels: torch.Tensor, ids: torch.Tensor, flips: torch.Tensor, layout: Any) -> torch.Tensor:
    """Float [n, 3, S, S] in 0..1 from uint8 [N, 3, S, S] on the device; ids int64 [n], flips bool [n]: horizontally."""
    images = pixels[ids]
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    return (images.float() / 255).contiguous(memory_format=layout)


def decode(suite: Suite) -> dict[str, Any]:
    """images/s of each way to a batch on the device."""
    need("nvidia.dali")
    from cifar_dist.data import pipeline  # noqa: PLC0415
    from cifar_dist.data.order import ImageSpec  # noqa: PLC0415

    device, batch_size = suite.device, suite.args.decode_batch
    encoded = jpegs(batch_size)
    augment = ImageSpec(image_size=32, flips="both").draw(0, 0, np.arange(batch_size))
    spec = ImageSpec(image_size=32, input_range="0..1", channels_last=suite.cuda)
    threads = suite.args.dali_threads

    def through(target: torch.device, decoder: torch.device) -> Callable[[], object]:
        pipe = pipeline.ImagePipeline(
            spec, max_batch_size=batch_size, encoded=True, resize=False, device=decoder, num_threads=threads
        )
        pipe.submit(encoded, augment)

        def call() -> torch.Tensor:
            pipe.submit(encoded, augment)  # one ahead, as the loader does
            return pipe.collect().to(target)

        return call

    calls = {"DALI, CPU decoder": through(device, torch.device("cpu"))}
    if suite.cuda:
        calls["DALI, mixed decoder"] = through(device, device)
    pixels = next(pipeline.decode([encoded], batch_size, threads))
    on_device = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).to(device)
    ids = torch.randperm(batch_size, device=device)
    flips = torch.from_numpy(augment.flips[:, 0].copy()).to(device)
    calls["decoded on the device"] = lambda: device_batch(on_device, ids, flips, suite.layout)
    for call in calls.values():
        call()
    rounds = suite.compare(calls)
    rates = {way: summary(batch_size / r[way] for r in rounds) for way in calls}
    for way in calls:
        suite.add_row(f"decode {batch_size}, {way}", summary(1000 * r[way] for r in rounds), batch_size)
    return {
        "batch_size": batch_size,
        "dali_threads": threads,
        "bytes_per_image": statistics.mean(len(e) for e in encoded),
        "images_per_second": rates,
        "ratio_to_cpu_decoder": {way: ratio(rounds, way, "DALI, CPU decoder", inverse=True) for way in calls},
    }


@dataclass
class FedStep:
    """A training step of Fan on static inputs: `images` and `labels` are overwritten, then `run` is called."""

    run: Callable[[], torch.Tensor]
    images: torch.Tensor
    labels: torch.Tensor

    def feed(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        return self.run()


def fastest_way(suite: Suite) -> str:
    return suite.ways[-1]


def feed(suite: Suite) -> dict[str, Any]:
    """The share of a step's time that the input costs, from the device and from the loader."""
    device, batch_size = suite.device, suite.args.feed_batch
    model = models.build("fan").to(device).to(memory_format=suite.layout)
    static = FedStep(
        lambda: torch.zeros(()), suite.images(batch_size, 32), torch.zeros(batch_size, dtype=torch.int64, device=device)
    )
    way = fastest_way(suite)
    step = training_step(
        suite, model, compiled(model, way), adam(model, device), lambda: (static.images, static.labels)
    )
    static.run = ready(suite, step, way)
    pixels = torch.randint(256, (50 * batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (len(pixels),), device=device)

    def from_device() -> None:
        ids = torch.randint(len(pixels), (batch_size,), device=device)
        flips = torch.rand(batch_size, device=device) < 0.5
        static.feed(device_batch(pixels, ids, flips, suite.layout), labels[ids])

    calls: dict[str, Callable[[], object]] = {"one batch": static.run, "decoded on the device": from_device}
    with TemporaryDirectory() as folder:
        without = ""
        try:
            need("nvidia.dali", "pyarrow", "filelock", "PIL")
            calls |= {f"loader, {c}": loader_call(suite, static, folder, c) for c in ("encoded", "decoded")}
        except Skipped as reason:
            without = f"without the loader: {reason}"
            print(without, flush=True)
        for call in calls.values():
            call()
        rounds = suite.compare(calls)
    shares = {n: summary(1 - r["one batch"] / r[n] for r in rounds) for n in calls if n != "one batch"}
    milliseconds = {n: summary(1000 * r[n] for r in rounds) for n in calls}
    for name, figures in milliseconds.items():
        text = f"input {shares[name]['median']:.1%}" if name in shares else ""
        suite.add_row(f"fan {batch_size} fed, {name}", figures, batch_size, text=text)
    return {"batch_size": batch_size, "way": way, "ms_per_step": milliseconds, "input_share": shares, "note": without}


def loader_call(suite: Suite, static: FedStep, folder: str, cache: str) -> Callable[[], object]:
    """A step fed by this project's loader, on drawn shapes."""
    from cifar_dist.data import sources  # noqa: PLC0415
    from cifar_dist.data import store as data_store  # noqa: PLC0415
    from cifar_dist.data.loader import Loader  # noqa: PLC0415
    from cifar_dist.data.order import ImageSpec, train_plans  # noqa: PLC0415
    from cifar_dist.data.private import Staging  # noqa: PLC0415
    from cifar_dist.data.staged import DataSet  # noqa: PLC0415

    batch_size, spec = len(static.labels), ImageSpec(image_size=32, channels_last=suite.cuda, flips="both")
    data_store.prepare(sources.shapes(4 * batch_size, 20), f"{folder}/data")
    loader = Loader(
        DataSet.open(f"{folder}/data", Staging(folder=f"{folder}/staged")),
        "train",
        spec,
        device=suite.device,
        num_threads=suite.args.dali_threads,
        max_batch_size=batch_size,
        cache=cache,
        cache_budget_mib=4096,
    )

    def batches() -> Any:
        epoch = 0
        while True:
            ids = np.arange(4 * batch_size)
            yield from loader.batches(
                train_plans(ids, spec, seed=0, epoch=epoch, first_step=0, global_batch_size=batch_size, rank=0, world=1)
            )
            epoch += 1

    endless = batches()

    def call() -> torch.Tensor:
        batch = next(endless)
        return static.feed(batch.images, batch.labels)

    return call


# A training


def read_images(data: str) -> tuple[np.ndarray, ...]:
    """(train images, train labels, test images, test labels): uint8 [n, 32, 32, 3] and int64 [n]."""
    if data.endswith(".npz"):
        with np.load(data) as file:
            return tuple(file[f"{s}_{k}"] for s in ("train", "test") for k in ("images", "labels"))
    need("PIL")
    found: dict[str, list[tuple[bytes, Any]]] = {"train": [], "test": []}
    if ".tar" in data:
        with tarfile.open(data) as archive:
            for member in archive:
                parts = member.name.split("/")
                if member.isfile() and len(parts) >= 3 and parts[-3] in found:
                    content = archive.extractfile(member)
                    assert content is not None
                    found[parts[-3]].append((content.read(), parts[-2]))
    else:
        need("pyarrow")
        import pyarrow.parquet as pq  # noqa: PLC0415

        for split, items in found.items():
            for file in sorted(Path(data).glob(f"{split}-*.parquet")):
                rows = pq.read_table(file).to_pydict()
                items += [(image["bytes"], label) for image, label in zip(rows["image"], rows["label"], strict=True)]
    if not all(found.values()):
        raise UserError(f"{data} holds no train and test images; name a prepared data set, a .npz or a .tar")
    from PIL import Image  # noqa: PLC0415

    classes = {name: i for i, name in enumerate(sorted({label for _, label in found["train"]}))}
    arrays = []
    for items in found.values():
        arrays.append(np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content, _ in items]))
        arrays.append(np.array([classes[label] for _, label in items]))
    return tuple(arrays)


def drawn_images(num_train: int, num_test: int) -> tuple[np.ndarray, ...]:
    need("pyarrow", "PIL")
    from cifar_dist.data.sources.drawn_shapes import shapes  # noqa: PLC0415

    splits = shapes(num_train, num_test).splits
    return tuple(
        part
        for split in ("train", "test")
        for part in (np.stack([i.read() for i in splits[split]]), np.array([i.label for i in splits[split]]))
    )


def training(suite: Suite) -> dict[str, Any]:
    """Accuracy on the test images after each epoch, and seconds of training until then. One run."""
    args, device = suite.args, suite.device
    arrays = read_images(args.data) if args.data else drawn_images(*args.shapes)
    pixels, labels, test_pixels, test_labels = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays)
    pixels, test_pixels = (p.permute(0, 3, 1, 2).contiguous() for p in (pixels, test_pixels))
    batch_size = min(args.train_batch, len(pixels))
    num_classes = int(labels.max()) + 1
    model = models.build("fan", num_classes, batchnorm_momentum=0.9).to(device).to(memory_format=suite.layout)
    optimizer = adam(model, device)
    ids = torch.arange(batch_size, device=device)
    flips = torch.zeros(batch_size, dtype=torch.bool, device=device)
    way = fastest_way(suite)
    start_weights = {name: value.clone() for name, value in model.state_dict().items()}

    def batch() -> tuple[torch.Tensor, torch.Tensor]:  # inside the graph: it reads ids and flips
        return device_batch(pixels, ids, flips, suite.layout), labels[ids]

    step = ready(suite, training_step(suite, model, compiled(model, way), optimizer, batch), way)
    model.load_state_dict(start_weights)  # warm-up has trained: back, without moving a tensor that the graph knows
    for values in optimizer.state.values():
        for value in values.values():
            value.zero_()
    num_steps = len(pixels) // batch_size
    epochs: list[dict[str, float]] = []
    seconds, total = 0.0, num_steps * args.epochs
    for epoch in range(args.epochs):
        model.train()
        synchronize(device)
        start = time.perf_counter()
        shuffled = torch.randperm(len(pixels), device=device)
        for i in range(num_steps):  # a smaller last batch is left out: the graph has one size
            set_rate(optimizer, args.learning_rate * triangle(epoch * num_steps + i, total))
            ids.copy_(shuffled[i * batch_size : (i + 1) * batch_size])
            flips.bernoulli_(0.5)
            loss = step()
        synchronize(device)
        seconds += time.perf_counter() - start
        accuracy = evaluate(suite, model, test_pixels, test_labels)
        epochs.append({"seconds": round(seconds, 4), "loss": float(loss), "test_accuracy": accuracy})
        print(f"epoch {epoch + 1}: {epochs[-1]}", flush=True)
        if accuracy >= args.target_accuracy:
            break
    best = max(epochs, key=lambda e: e["test_accuracy"])
    reached = best["test_accuracy"] >= args.target_accuracy
    text = f"{best['test_accuracy']:.2%} after {best['seconds']:.2f} s"
    step_seconds = seconds / (num_steps * len(epochs))
    suite.add_row(f"training {batch_size}, {way}", summary([1000 * step_seconds]), batch_size, text=text)
    return {
        "data": Path(args.data).name if args.data else "shapes",
        "num_train": len(pixels),
        "num_test": len(test_pixels),
        "batch_size": batch_size,
        "way": way,
        "target_accuracy": args.target_accuracy,
        "seconds_to_target": best["seconds"] if reached else None,
        "images_per_second": batch_size / step_seconds,
        "epochs": epochs,
        "n": 1,
    }


def triangle(step: int, num_steps: int) -> float:
    """The share of the peak rate: up over the first 30% of the steps, then down to 0."""
    peak = 0.3 * num_steps
    return min((step + 1) / peak, (num_steps - step) / (num_steps - peak), 1.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@torch.inference_mode()
def evaluate(suite: Suite, model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy over all images in inference mode, on the plain network."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=suite.device)
    for images, expected in zip(pixels.split(1000), labels.split(1000), strict=True):
        with suite.autocast():
            logits = model((images.float() / 255).contiguous(memory_format=suite.layout))
        correct += (logits.argmax(1) == expected).sum()
    return correct.item() / len(labels)


# All of it


def sections(args: Namespace) -> dict[str, Callable[[Suite], dict[str, Any]]]:
    """What to run, the most wanted first."""

    def case(*values: Any, **more: bool) -> Callable[[Suite], dict[str, Any]]:
        return lambda suite: network(suite, Case(*values, **more))

    fans = [(f"fan-{b}", case("fan", b, 32)) for b in args.fan_batches]
    resnet = "resnet50v2", args.resnet_batch, args.image_size
    return {
        "limits": limits,
        **dict(fans[:2]),
        "training": training,
        "resnet-forward": case(*resnet, forward_only=True),
        "resnet-finetuned": case(*resnet, finetune=True),
        "feed": feed,
        "decode": decode,
        "resnet-frozen": case(*resnet),
        **dict(fans[2:]),
    }


HEADER = ("what", "TFLOP/s, TB/s or found", "ms/step", "images/s", "s/epoch", "rate", "bandwidth", "MiB")


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
    suite = Suite(args, device)
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
    p.add_argument("--minutes", type=float, default=10, help="no section is begun near the end of these (default 10)")
    p.add_argument("--sections", nargs="+", default=[], help="only these (default all); `fan` means all of its batches")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=0.3, help="of each measurement (default 0.3)")
    p.add_argument("--matrix-sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    p.add_argument("--copy-mib", type=int, default=2048, help="size of a vector for the bandwidth (default 2048)")
    p.add_argument("--fan-batches", type=int, nargs="+", default=[64, 512, 128, 1024])
    p.add_argument("--resnet-batch", type=int, default=256)
    p.add_argument("--image-size", type=int, default=224, help="resnet50v2's, in pixels (default 224)")
    p.add_argument("--decode-batch", type=int, default=2048)
    p.add_argument("--dali-threads", type=int, default=8)
    p.add_argument("--feed-batch", type=int, default=512)
    p.add_argument("--data", default="", help="of the training: a prepared data set, a .npz or a .tar")
    p.add_argument("--shapes", type=int, nargs=2, default=[SHAPES_TRAIN, SHAPES_TEST], help="drawn without --data")
    p.add_argument("--train-batch", type=int, default=512)
    p.add_argument("--learning-rate", type=float, default=2e-3, help="the training's peak rate (default 0.002)")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--target-accuracy", type=float, default=0.85)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return p


if __name__ == "__main__":
    options = parser().parse_args()
    sys.exit(exit_code_of(lambda: main(options), options.debug))
