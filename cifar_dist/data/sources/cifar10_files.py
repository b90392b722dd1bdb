"""The source CIFAR-10, which torchvision downloads."""

import functools
import os
from functools import partial
from pathlib import Path
from urllib.error import URLError

import numpy as np

from cifar_dist.data.sources.archives import temporary_folder
from cifar_dist.data.sources.source import Item, Source
from cifar_dist.errors import UserError


def cifar10(path: str | None) -> Source:
    """Returns CIFAR-10 (60,000 images, 32 px), downloaded and verified by torchvision. Images are stored as PNG."""
    from torchvision.datasets import CIFAR10  # noqa: PLC0415 - slow to import, needed here only

    try:
        root = Path(os.path.expanduser(path)) if path else Path.home() / ".cache" / "cifar_dist"
    except RuntimeError as error:
        raise UserError(
            "HOME is not set, so there is no folder to keep CIFAR-10 in; set it, or name a folder with --path"
        ) from error
    if path and not root.is_dir():
        raise UserError(f"the folder {root} does not exist; --path names where CIFAR-10 is or shall be kept")
    try:
        parts = {split: CIFAR10(str(root), train=split == "train", download=True) for split in ("train", "test")}
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} to {root} ({error}). Without a network, fetch "
            f"{CIFAR10.filename} elsewhere, put it into a folder and name that folder with --path; or use "
            "--source folder on images of your own, or --source shapes, which needs no network"
        ) from error

    def items(split: str) -> list[Item]:
        file = Path(temporary_folder(), f"{split}.npy")
        np.save(file, parts[split].data)  # for the processes that encode the pictures
        targets = parts[split].targets
        return [Item(f"{split}-{i:05d}.png", targets[i], partial(pixels_of, str(file), i)) for i in range(len(targets))]

    splits = {split: items(split) for split in parts}
    return Source.of("cifar10", list(parts["train"].classes), splits, identity="cifar10")


@functools.lru_cache(maxsize=2)
def pixels_in(file: str) -> np.ndarray:
    return np.load(file, mmap_mode="r")


def pixels_of(file: str, i: int) -> np.ndarray:
    """Returns uint8 [32, 32, 3]."""
    return np.asarray(pixels_in(file)[i])
