"""Input speed: this project's loader against torchvision v2 with DataLoader, Ray Data and the floor, side by side.

    python benchmarks/input.py [--data URI] [--num-images N] [--rounds N]

All ways give shuffled batches of 64 float32 images of a prepared data set (--data; else drawn shapes, which are PNG),
flipped at random and scaled to 0..1, at 32 px and, enlarged, at 224 px (a tenth as many images). A way is measured in
images/s over a whole epoch; what starts once (processes, Ray, caches) is done in an epoch before the first round.
"floor" is the least that could be done: pixels already decoded in memory, indexed, flipped, scaled and resized by plain
NumPy and PyTorch operations. The loader and the floor write the layout of the case; the peers always their cheapest,
contiguous. Ray Data does not shuffle, which spares it that cost. Prints a table, writes benchmarks/results/input.json.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import side_by_side
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import v2

from cifar_dist.command_line import Parser
from cifar_dist.data import sources, store
from cifar_dist.data.loader import Loader
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.order import ImageSpec, train_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet, StagedSplit
from cifar_dist.environment import prepare_environment

BATCH = 64
DECODED, ENCODED, FLOOR = "this loader, decoded cache", "this loader, encoded", "floor"
DATALOADER, RAY_DATA = "torchvision + DataLoader", "Ray Data"


def transform(image_size: int) -> v2.Compose:
    """The peers': flips while the image is small, the resize on uint8, which torchvision has the fastest code for."""
    resize = [v2.Resize((image_size, image_size), antialias=False)] if image_size != 32 else []
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    return v2.Compose([*flips, *resize, v2.ToDtype(torch.float32, scale=True)])


class Images(Dataset):
    """Torchvision decodes and transforms one image at a time."""

    def __init__(self, staged: StagedSplit, image_size: int) -> None:
        self.staged, self.transform = staged, transform(image_size)

    def __len__(self) -> int:
        return len(self.staged)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        encoded = torch.from_numpy(self.staged.encoded(i).copy())
        return self.transform(decode_image(encoded, mode="RGB")), int(self.staged.labels[i])


def floor(pixels: np.ndarray, image_size: int, channels_last: bool) -> Iterator[torch.Tensor]:
    random = np.random.default_rng(0)
    order = random.permutation(len(pixels))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for start in range(0, len(pixels), BATCH):
        batch = pixels[order[start : start + BATCH]]
        flip_x, flip_y = random.random((2, len(batch))) < 0.5
        batch[flip_x] = batch[flip_x, :, ::-1]
        batch[flip_y] = batch[flip_y, ::-1]
        images = torch.from_numpy(batch).permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format).div_(255)
        yield interpolate(images, (image_size, image_size), mode="bilinear") if image_size != 32 else images


def ray_data(file: Path, image_size: int) -> Callable[[], Iterator[torch.Tensor]]:
    import ray.data  # noqa: PLC0415 - the environment is prepared first

    change = transform(image_size)

    def read(batch: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        images = [change(decode_image(torch.from_numpy(np.frombuffer(b, np.uint8).copy()))) for b in batch["bytes"]]
        return {"image": torch.stack(images).numpy(), "label": batch["label"]}

    def epoch() -> Iterator[torch.Tensor]:
        rows = ray.data.read_parquet(str(file), override_num_blocks=16).map_batches(read, batch_size=BATCH)
        return (batch["image"] for batch in rows.iter_torch_batches(batch_size=BATCH, prefetch_batches=2))

    return epoch


def start_ray(num_cpus: int) -> None:
    prepare_environment()
    import ray  # noqa: PLC0415

    ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    import ray.data  # noqa: PLC0415

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def images_per_second(batches: Iterable[torch.Tensor], num_images: int) -> float:
    start = time.perf_counter()
    seen = sum(len(images) for images in batches)
    seconds = time.perf_counter() - start
    if seen != num_images:
        raise RuntimeError(f"{seen} images came, not {num_images}")
    return seen / seconds


def ways(
    uri: str, folder: Path, image_size: int, channels_last: bool, num_images: int, num_cpus: int
) -> dict[str, Callable[[], float]]:
    """Name -> a function that runs one epoch and returns images/s."""
    data = DataSet.open(uri, Staging(folder=folder / "staged"))
    staged = data.stage("train")
    spec = ImageSpec(image_size=image_size, channels_last=channels_last, flips="both")
    epochs: dict[str, Callable[[], Iterable[torch.Tensor]]] = {}

    # Its processes are forked, so before DALI's threads start; they stay from epoch to epoch.
    subset = torch.utils.data.Subset(Images(staged, image_size), range(num_images))
    workers: Any = {"num_workers": num_cpus, "persistent_workers": True, "multiprocessing_context": "fork"}
    dataloader = DataLoader(subset, BATCH, shuffle=True, **workers)
    next(iter(dataloader))

    def open_loader(cache: str) -> Loader:
        settings = {"device": torch.device("cpu"), "num_threads": num_cpus, "max_batch_size": BATCH, "cache": cache}
        return Loader(data, "train", spec, **settings, cache_budget_mib=4096)

    def loaded(loader: Loader) -> Iterator[torch.Tensor]:
        plans = train_plans(
            np.arange(num_images), spec, seed=0, epoch=0, first_step=0, global_batch_size=BATCH, rank=0, world=1
        )
        return (batch.images for batch in loader.batches(plans))

    decoded, encoded = open_loader("decoded"), open_loader("encoded")
    pixels = np.array(decoded.decoded[:num_images])  # type: ignore[index]
    epochs[DECODED] = lambda: loaded(decoded)
    epochs[ENCODED] = lambda: loaded(encoded)
    epochs[FLOOR] = lambda: floor(pixels, image_size, channels_last)
    epochs[DATALOADER] = lambda: (batch[0] for batch in dataloader)
    file = folder / f"{num_images}.parquet"
    rows = {"bytes": [staged.encoded(i).tobytes() for i in range(num_images)], "label": staged.labels[:num_images]}
    pq.write_table(pa.table(rows), file, row_group_size=BATCH, compression="none")
    epochs[RAY_DATA] = ray_data(file, image_size)
    return {name: lambda start=start: images_per_second(start(), num_images) for name, start in epochs.items()}


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", help="a prepared data set of 32-px images (default: drawn shapes)")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=side_by_side.RESULTS, help="folder of input.json")
    args = parser.parse_args()
    num_cpus = os.cpu_count() or 1
    results, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = args.data
        if not uri:
            uri = f"{folder}/data"
            store.prepare(sources.shapes(args.num_images, 20), uri)
        num_train = read_manifest(uri).num_rows("train")
        start_ray(num_cpus)
        for image_size, channels_last in ((32, False), (32, True), (224, False), (224, True)):
            num_images = min(args.num_images, num_train) // (1 if image_size == 32 else 10)
            layout = "channels_last" if channels_last else "contiguous"
            print(f"{image_size} px, {layout}, {num_images} images", flush=True)
            measured = ways(uri, folder, image_size, channels_last, num_images, num_cpus)
            rounds = side_by_side.measure(measured, args.rounds, warm_up=True)
            for way in measured:
                speed = side_by_side.summary(r[way] for r in rounds)
                ratios = {
                    "ratio_to_dataloader": side_by_side.ratio(rounds, way, DATALOADER),
                    "ratio_to_ray_data": side_by_side.ratio(rounds, way, RAY_DATA),
                    "floor_over_this": side_by_side.ratio(rounds, way, FLOOR, inverse=True),
                }
                case = {"image_size": image_size, "layout": layout, "num_images": num_images, "way": way}
                results.append({**case, "images_per_second": speed, **ratios})
                cells = (f"{speed['median']:,.0f}", *(side_by_side.cell(ratio) for ratio in ratios.values()))
                rows.append((f"{image_size} px {layout}, {way}", *cells))
    header = "case", "images/s", "over DataLoader", "over Ray Data", "floor over it"
    print(side_by_side.table(header, rows))
    side_by_side.store("input", results, args.out)


if __name__ == "__main__":
    main()
