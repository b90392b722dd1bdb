"""Whether this code works on a GPU: training steps in each mode, checkpoints, pixels, and one whole job.

    python benchmarks/gpu_smoke.py [--parts steps graphs ...] [--device cuda]

Prints a line for each check and ends with exit code 1 if one failed. With --device cpu the same code runs without
graphs.

steps: a few steps of each optimizer, precision and option.   graphs: the same bits with a CUDA graph and without it.
state: a checkpoint's state, restored, goes on to the same bits.   starts: to compile first changes nothing.
log: lines finished later say the same.   ranks: DistributedDataParallel over NCCL, one rank.
pixels: the GPU's pixels against the CPU's, for each format.   job: prepare, train, resume, evaluate with Ray.
"""

import argparse
import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from cifar_dist.data.order import ImageSpec, eval_plans, train_plans  # noqa: E402
from cifar_dist.data.resident import ResidentImages  # noqa: E402
from cifar_dist.models.layers import Dropout, Flatten, KerasBatchNorm  # noqa: E402
from cifar_dist.recipes import recipe_config  # noqa: E402
from cifar_dist.run.checkpoint import Checkpoint, CheckpointState, Cursor  # noqa: E402
from cifar_dist.run.network import build_model, image_spec, use_exact_fp32  # noqa: E402
from cifar_dist.train import assemble, rank_state  # noqa: E402
from cifar_dist.train.communication import parallel  # noqa: E402
from cifar_dist.train.loop import train_epoch, validate  # noqa: E402
from cifar_dist.train.reporting import Reporter  # noqa: E402
from cifar_dist.train.saver import HostMemory  # noqa: E402
from cifar_dist.train.state import TrainState  # noqa: E402
from cifar_dist.train.step import Step  # noqa: E402
from cifar_dist.train.step_log import StepLog  # noqa: E402
from cifar_dist.train.trees import mapped  # noqa: E402

NUM_CLASSES, BATCH, NUM_IMAGES = 10, 16, 100  # six full steps and one of 4 images
MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"precision": "fp32"},
    "fp16, clipped": {"precision": "fp16", "clip_norm": 1.0},
    "average": {"ema_decay": 0.99},
    "sgd, decay": {"optimizer": "sgd", "weight_decay": 1e-3},
    "adamw, fp16, decay": {"optimizer": "adamw", "weight_decay": 0.1, "precision": "fp16"},
    "accumulated": {"accumulation_steps": 3},
    "deterministic": {"deterministic": True},
    "crop, cutout, flips": {"crop_padding": 4, "cutout_size": 8, "flips": "both"},
    "contiguous": {"memory_format": "contiguous"},
    "compiled": {"compile": "on"},
}


class Smoke:
    def __init__(self, device: torch.device) -> None:
        self.device, self.failed = device, list[str]()
        self.models: dict[str, Any] = {}

    def check(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        try:
            found = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            word = "ok  "
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            word, found = "FAIL", f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{word} {name} ({time.perf_counter() - start:.1f} s) {'' if found is None else found}", flush=True)

    def state(self, recipe: str = "quickstart_fan", **settings: Any) -> tuple[TrainState, ResidentImages]:
        common = {
            "precision": "bf16",
            "compile": "off",
            "global_batch_size": BATCH,
            "train_images": 0,
            "epochs": 3,
            "cuda_graph": "off",
        }
        config = recipe_config(recipe, **{**common, **settings})
        torch.use_deterministic_algorithms(config.loop.deterministic)
        torch.backends.cudnn.benchmark = False
        spec = image_spec(config, self.device)
        key = json.dumps([config.model.model, config.model.finetune, spec.channels_last])
        if key not in self.models:
            build = small_network if self.device.type == "cpu" and config.model.model == "fan" else build_model
            self.models[key] = build(config, NUM_CLASSES, spec, self.device)
        model = copy.deepcopy(self.models[key])
        random = np.random.default_rng(0)
        labels = random.integers(0, NUM_CLASSES, NUM_IMAGES)
        pixels = random.integers(0, 256, (NUM_IMAGES, 32, 32, 3), dtype=np.uint8)
        numbers = {"rank": 0, "world": 1, "num_threads": torch.get_num_threads(), "num_train": NUM_IMAGES}
        state = assemble.new_state(config, model, self.device, **numbers)
        base, state.trainable = assemble.split_frozen(state.model, state.precision.dtype)
        if base is not None:
            state.input_of = lambda batch: base(batch.images)
        assemble.wrap(state, NUM_IMAGES)
        return state, ResidentImages(pixels, labels, spec, self.device)


def small_network(config: Any, num_classes: int, spec: ImageSpec, device: torch.device) -> torch.nn.Module:
    """In place of Fan on a CPU, where 87 million weights take seconds a step."""
    torch.manual_seed(config.loop.seed)
    layers = (
        nn.Conv2d(3, 8, 3, 2),
        KerasBatchNorm(8),
        nn.ReLU(),
        Flatten(),
        Dropout(0.2),
        nn.Linear(1800, num_classes),
    )
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    return nn.Sequential(*layers).to(device).to(memory_format=layout)


def batches(state: TrainState, images: ResidentImages) -> Iterator[Any]:
    return images.batches(
        train_plans(
            np.arange(NUM_IMAGES),
            images.spec,
            seed=0,
            epoch=state.cursor.epoch,
            first_step=state.cursor.step,
            global_batch_size=BATCH,
            rank=0,
            world=1,
        )
    )


class Enough(Exception):
    pass


def train(
    state: TrainState,
    images: ResidentImages,
    num_epochs: int = 2,
    stop_at: int = 0,
    log: Callable[[Any], None] = lambda _clock: None,
) -> TrainState:
    """Trains; `stop_at`: the global step after which it stops. `log` gets the clock after each step."""
    step = Step(state)

    def after_step(clock: Any) -> None:
        log(clock)
        if state.global_step == stop_at:
            raise Enough

    while state.cursor.epoch < num_epochs:
        try:
            train_epoch(step, batches(state, images), after_step)
        except Enough:
            return state
        state.cursor = Cursor(state.cursor.epoch + 1, 0)
    return state


def loss_of(state: TrainState) -> str:
    loss, correct, seen = state.totals.tolist()
    assert np.isfinite(loss), loss
    assert all(bool(p.isfinite().all()) for p in state.model.parameters())
    return f"loss {loss / seen:.4f}, {correct:.0f} of {seen:.0f}"


def difference(a: TrainState, b: TrainState) -> tuple[float, float]:
    """The largest relative difference of the weights, and that of the losses."""
    pairs = list(zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
    largest = max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-9)) for x, y in pairs)
    return largest, float((a.totals - b.totals).abs()[0] / a.totals[0])


def same_bits(a: TrainState, b: TrainState) -> str:
    weights, loss = difference(a, b)
    averages = [] if a.average is None else list(zip(a.average.parameters(), b.average.parameters(), strict=True))
    assert weights == loss == 0, f"weights differ by {weights:.2g}, losses by {loss:.2g} (relative)"
    assert all(torch.equal(x, y) for x, y in averages), "the averages differ"
    return loss_of(a)


def steps(smoke: Smoke) -> None:
    for name, settings in MODES.items():
        smoke.check(f"steps: {name}", lambda settings=settings: loss_of(train(*smoke.state(**settings))))
    smoke.check("steps: muon", lambda: loss_of(train(*smoke.state(optimizer="muon"))))
    resnet: dict[str, Any] = {"recipe": "quickstart_resnet50v2", "image_size": 96}
    smoke.check("steps: resnet50v2 frozen", lambda: loss_of(train(*smoke.state(**resnet))))
    if smoke.device.type == "cuda":  # a minute on a CPU
        smoke.check("steps: resnet50v2 fine-tuned", lambda: loss_of(train(*smoke.state(**resnet, finetune=True))))
    smoke.check("steps: validate", lambda: validation(*smoke.state()))


def validation(state: TrainState, images: ResidentImages) -> list[float]:
    """Between two epochs, as a run does: validation runs in inference mode, on the loader that training uses."""
    train(state, images, num_epochs=1)
    plans = eval_plans(np.arange(NUM_IMAGES), NUM_IMAGES, 0, 1)
    totals = validate(state.model, images.batches(plans), state.precision, state.input_of)
    train(state, images, num_epochs=2)
    return totals.tolist()


def graphs(smoke: Smoke) -> None:
    modes = {name: ("quickstart_fan", settings) for name, settings in MODES.items()}
    if smoke.device.type == "cuda":
        modes["resnet50v2 frozen"] = "quickstart_resnet50v2", {"image_size": 96}
        modes["resnet50v2 fine-tuned"] = "quickstart_resnet50v2", {"image_size": 96, "finetune": True}
    for name, (recipe, settings) in modes.items():
        deterministic = {"deterministic": True, **settings}

        def both(recipe: str = recipe, settings: dict[str, Any] = deterministic) -> str:
            plain = train(*smoke.state(recipe, **settings))
            return same_bits(plain, train(*smoke.state(recipe, **settings, cuda_graph="auto")))

        smoke.check(f"graphs: {name}", both)


def state_part(smoke: Smoke) -> None:
    for graph in ("off", "auto"):
        for settings in ({}, {"precision": "fp16", "clip_norm": 1.0, "ema_decay": 0.9}):

            def resumed(graph: str = graph, settings: dict[str, Any] = settings) -> str:
                more = {"deterministic": True, "cuda_graph": graph, **settings}
                whole = train(*smoke.state(**more))
                stopped = train(*smoke.state(**more), stop_at=5)
                meta = rank_state.checkpoint_meta(stopped, stopped.totals.tolist(), None)
                held = rank_state.checkpoint_state(stopped, rank_state.gather_rows(stopped))
                held = HostMemory().copy(CheckpointState(**mapped(vars(held), torch.Tensor, torch.clone)))
                state, images = smoke.state(**more)
                checkpoint = Checkpoint("here", {**meta, **stopped.cursor._asdict(), "attempt": 1})
                rank_state.restore(state, checkpoint, held, "here")
                return same_bits(whole, train(state, images))

            smoke.check(f"state: resumed, graph {graph}, {settings}", resumed)


def starts(smoke: Smoke) -> None:
    """To compile before the first step changes nothing."""

    def same(**settings: Any) -> str:
        more = {"deterministic": True, "compile": "on", **settings}
        late, (state, images) = train(*smoke.state(**more)), smoke.state(**more)
        assemble.compile_now(state, SimpleNamespace(train_batches=lambda _cursor: batches(state, images)))  # type: ignore[arg-type]
        return same_bits(late, train(state, images))

    smoke.check("starts: compiled before the first step", same)
    smoke.check("starts: and with a graph", lambda: same(cuda_graph="auto"))


def log(smoke: Smoke) -> None:
    """Lines that are finished later say what lines say that wait for the device, and training computes the same."""

    def lines(defers: bool) -> tuple[list[Any], TrainState]:
        state, images = smoke.state(cuda_graph="auto", deterministic=True)
        found: list[Any] = []
        reporter = Reporter(SimpleNamespace(update=SimpleNamespace(remote=found.append)), state)
        reporter.log = SimpleNamespace(add=lambda *_, **__: None)  # type: ignore[assignment]
        diagnosis: Any = SimpleNamespace(check_training=lambda *_: None)
        step_log = StepLog(state, reporter, diagnosis, lambda: None)
        step_log.defers = defers
        train(state, images, num_epochs=1, log=step_log.begin)
        step_log.finish()
        return [[line[n] for n in ("global_step", "step", "train_loss", "train_accuracy")] for line in found], state

    def same() -> str:
        (now, one), (later, other) = lines(defers=False), lines(defers=True)
        assert now == later, f"{now} or {later}"
        return f"{len(now)} lines, {same_bits(one, other)}"

    smoke.check("log: lines that are finished later", same)


def ranks(smoke: Smoke) -> None:
    backend = "nccl" if smoke.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:

            def wrapped(**settings: Any) -> str:
                alone = train(*smoke.state(**settings))
                state, images = smoke.state(**settings)
                state.trainable, state.communication = parallel(state.trainable, smoke.device, "fp32")
                found = same_bits(alone, train(state, images))
                waited = sum(end.seconds_since(start) for start, end in state.communication.take())
                return f"{found}, waited {waited:.4f} s in the last epoch"

            smoke.check("ranks: the same bits", wrapped)
            smoke.check("ranks: compiled", lambda: wrapped(compile="on"))
        finally:
            dist.destroy_process_group()


def encoded_images() -> dict[str, bytes]:
    y, x = np.mgrid[0:45, 0:61]
    photo = np.stack([128 + 100 * np.sin(x / 7), 128 + 90 * np.cos(y / 5), (x * y) % 256], -1).astype(np.uint8)
    image, found = Image.fromarray(photo), {}
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "JPEG 4:2:0": ("JPEG", {"subsampling": 2, "quality": 90}),
        "JPEG 4:2:2": ("JPEG", {"subsampling": 1, "quality": 90}),
        "JPEG 4:4:4": ("JPEG", {"subsampling": 0, "quality": 90}),
        "JPEG progressive": ("JPEG", {"progressive": True, "quality": 75}),
        "PNG": ("PNG", {}),
        "WebP": ("WEBP", {"lossless": True}),
        "BMP": ("BMP", {}),
        "TIFF": ("TIFF", {}),
        "PPM": ("PPM", {}),
    }
    for name, (kind, more) in options.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **more)
        found[name] = buffer.getvalue()
    buffer = io.BytesIO()
    image.convert("L").save(buffer, "JPEG")
    found["JPEG grey"] = buffer.getvalue()
    return found


def pixels(smoke: Smoke) -> None:
    from cifar_dist.data.pipeline import ImagePipeline  # noqa: PLC0415 - DALI may be missing

    spec = ImageSpec(image_size=40, input_range="0..255", crop_padding=3, cutout_size=7, flips="both")
    plain = ImageSpec(image_size=40, input_range="0..255")
    ways = {
        "fit": replace(plain, resize="fit", channels_last=True),
        "crop": replace(plain, resize="crop"),
        "crop, antialias, augmented": replace(spec, resize="crop", antialias=True),
    }

    def difference(data: bytes, spec: ImageSpec) -> str:
        made = []
        for device in (torch.device("cpu"), smoke.device):
            pipe = ImagePipeline(spec, max_batch_size=4, encoded=True, resize=True, device=device, num_threads=2)
            augment = spec.draw(3, 1, np.arange(4))
            pipe.submit([np.frombuffer(data, np.uint8)] * 4, augment)
            made.append(pipe.collect().cpu())
        apart = (made[0] - made[1]).abs()
        assert apart.max() <= 4, f"largest {apart.max():.2f} of 255, mean {apart.mean():.4f}"
        return f"largest {apart.max():.2f} of 255, mean {apart.mean():.4f}"

    for name, data in encoded_images().items():
        smoke.check(f"pixels: {name}", lambda data=data: difference(data, plain))
    smoke.check("pixels: augmented PNG", lambda: difference(encoded_images()["PNG"], spec))
    for name, way in ways.items():
        smoke.check(f"pixels: {name}", lambda way=way: difference(encoded_images()["PNG"], way))


def job(smoke: Smoke) -> None:
    def command(*words: str, limit: float = 150) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "cifar_dist", *words],
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        print(done.stdout[-2500:])
        return f"{time.perf_counter() - start:.1f} s"

    folder = tempfile.mkdtemp()
    data, runs = f"{folder}/data", f"{folder}/runs"
    where = ("--device", "gpu" if smoke.device.type == "cuda" else "cpu")
    fan = ("train", "--recipe", "quickstart_fan", "--data", data, "--storage", runs, "--name", "fan", *where)
    smoke.check(
        "job: prepare",
        lambda: command("prepare", "--source", "shapes", "--num-train", "2000", "--num-test", "400", "--out", data),
    )
    smoke.check("job: train", lambda: command(*fan, "--epochs", "2"))
    smoke.check("job: go on", lambda: command(*fan, "--epochs", "4"))
    report = ("--data", data, "--shards", "1", "--out", f"{folder}/report")
    evaluate = ("evaluate", "--runs", f"{runs}/fan", *report, *where)
    smoke.check("job: evaluate", lambda: command(*evaluate))
    smoke.check("job: evaluate in fp32", lambda: command(*evaluate, "--precision", "fp32"))


PARTS: dict[str, Callable[[Smoke], None]] = {
    "steps": steps,
    "graphs": graphs,
    "state": state_part,
    "starts": starts,
    "log": log,
    "ranks": ranks,
    "pixels": pixels,
    "job": job,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    smoke = Smoke(torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu"))
    use_exact_fp32()
    for part in args.parts:
        smoke.check(part, lambda part=part: PARTS[part](smoke))
    print(f"{len(smoke.failed)} failed: {', '.join(smoke.failed)}" if smoke.failed else "everything works")
    return bool(smoke.failed)


if __name__ == "__main__":
    sys.exit(main())
