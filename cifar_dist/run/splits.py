"""Where the images of a run's splits are stored: all rows of a stored split, or a part of train."""

import numpy as np

from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.manifest import Manifest


def stored_split(split: str, manifest: Manifest) -> str:
    """Returns the stored split that holds the images of `split`. Without an own split, validation is part of train."""
    return split if split in manifest.splits else "train"


def split_ids(config: Config, manifest: Manifest, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train ids, validation ids), int64: rows of train, and of the split that holds the validation images.

    labels: int64 [n], of all rows of train.
    """
    data = config.data
    if manifest.has_validation:
        train = order.drawn_evenly(np.arange(len(labels)), labels, data.train_images, data.split_seed)
        return train, np.arange(manifest.num_rows("validation"))
    return order.train_validation_ids(labels, data.validation_fraction, data.train_images, data.split_seed)


def ids_of(split: str, config: Config, manifest: Manifest, labels: np.ndarray) -> np.ndarray:
    """Returns the ids of `split`, int64: rows of its stored split, whose `labels` are int64 [n]."""
    if stored_split(split, manifest) != "train":
        return np.arange(len(labels))
    return split_ids(config, manifest, labels)[0 if split == "train" else 1]


def validation_source(config: Config, manifest: Manifest) -> str:
    """Returns where the run's validation images come from, in words."""
    if manifest.has_validation:
        return f"the data set's own split ({manifest.num_rows('validation'):,} images)"
    return f"drawn from train ({100 * config.data.validation_fraction:g}%, seed {config.data.split_seed})"
