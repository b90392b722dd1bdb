"""Input speed: this project's loader against torchvision and DataLoader on the same images, side by side.

    python benchmarks/input.py [--num-images N] [--rounds N]

Each round measures every way once, so that other load hits all alike; a ratio is taken within its round. Prints a table
and writes benchmarks/results/input.json.
"""

import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from cifar_dist.config import Parser
from cifar_dist.data import sources, store
from cifar_dist.data.loader import Loader, train_plans
from cifar_dist.data.order import Augmentation
from cifar_dist.data.spec import ImageSpec

BATCH = 64


class Images(Dataset):
    """What a tutorial writes: Pillow decodes, torchvision's v2 transforms resize, flip and normalize."""

    def __init__(self, staged: store.StagedSplit, image_size: int) -> None:
        self.staged = staged
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(image_size, antialias=False),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.staged)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.staged.encoded(i).tobytes())).convert("RGB")
        return self.transform(image), int(self.staged.labels[i])


def images_per_second(batches: Iterator, num_images: int) -> float:
    start = time.perf_counter()
    seen = sum(len(batch.labels if hasattr(batch, "labels") else batch[1]) for batch in batches)
    assert seen == num_images
    return seen / (time.perf_counter() - start)


def ways(uri: str, image_size: int, staging: Path, num_threads: int) -> dict[str, Callable[[], Iterator]]:
    """Name -> a function that starts one epoch."""
    manifest = store.read_manifest(uri)
    spec = ImageSpec(image_size, "0..1", channels_last=False)
    made = {}
    for cache in ("decoded", "encoded"):
        loader = Loader(uri, manifest, "train", spec, torch.device("cpu"), num_threads, BATCH, cache, 4096, staging)
        ids = np.arange(len(loader.staged))
        made[f"this loader, {cache}"] = lambda loader=loader, ids=ids: loader.batches(
            train_plans(ids, Augmentation(image_size, "both"), 0, 0, 0, BATCH, 0, 1)
        )
    dataset = Images(store.stage(uri, "train", staging, manifest), image_size)
    made["torchvision + DataLoader"] = lambda: iter(
        DataLoader(dataset, BATCH, shuffle=True, num_workers=num_threads, multiprocessing_context="fork")
    )
    return made


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--num-images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    num_threads = os.cpu_count() or 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store.prepare(sources.shapes(args.num_images, 20), f"{folder}/data")
        for image_size in (32, 224):
            epochs = ways(f"{folder}/data", image_size, Path(folder), num_threads)
            rounds = [
                {n: images_per_second(e(), args.num_images) for n, e in epochs.items()} for _ in range(args.rounds)
            ]
            for name in epochs:
                speeds = [r[name] for r in rounds]
                ratios = [r[name] / r["torchvision + DataLoader"] for r in rounds]
                results.append(
                    {
                        "image_size": image_size,
                        "way": name,
                        "images_per_second": statistics.median(speeds),
                        "ratio_to_dataloader": statistics.median(ratios),
                        "ratio_spread": [min(ratios), max(ratios)],
                        "n": args.rounds,
                    }
                )
    for r in results:
        low, high = r["ratio_spread"]
        print(
            f"{r['image_size']:4} px  {r['way']:26} {r['images_per_second']:9,.0f} images/s  "
            f"{r['ratio_to_dataloader']:6.2f} x DataLoader  ({low:.2f} to {high:.2f}, n={r['n']})"
        )
    hardware = {"processor": platform.processor() or platform.machine(), "num_cpus": num_threads}
    target = Path(__file__).parent / "results" / "input.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(
        json.dumps({"hardware": hardware, "num_images": args.num_images, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
