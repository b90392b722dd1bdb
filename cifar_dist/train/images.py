"""A rank's batches of training and validation images."""

from collections.abc import Iterator

import torch

from cifar_dist.config import Config
from cifar_dist.data.batch import Batch
from cifar_dist.data.joined import AnyLoader, JoinedLoader
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import eval_plans, train_plans
from cifar_dist.models.frozen import Head
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import eval_batch
from cifar_dist.run.splits import split_ids
from cifar_dist.train.features import DeviceFeatures, Features


class Images:
    """Gives a rank's batches, read by `reader`: the loader, or the features of a frozen base.

    `validation`: the loader of the data set's own validation split, if it has one. train_ids, validation_ids: int64,
    ids of `loader`, which reads both.
    """

    def __init__(self, train: Loader, validation: Loader | None, config: Config, *, rank: int, world: int) -> None:
        self.config, self.rank, self.world = config, rank, world
        self.train_ids, self.validation_ids = split_ids(config, train.data.manifest, train.staged.labels)
        self.loader: AnyLoader = train
        if validation:
            self.loader = JoinedLoader(train, validation)
            self.validation_ids = self.validation_ids + train.num_images
        self.reader: AnyLoader | Features | DeviceFeatures = self.loader

    def train_batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Yields this rank's batches of the cursor's epoch, from the cursor's step to the epoch's end."""
        loop = self.config.loop
        plans = train_plans(
            self.train_ids,
            self.loader.spec,
            seed=loop.seed,
            epoch=cursor.epoch,
            first_step=cursor.step,
            global_batch_size=loop.global_batch_size,
            rank=self.rank,
            world=self.world,
        )
        return self.reader.batches(plans)

    def validation_batches(self) -> Iterator[Batch]:
        return self.reader.batches(
            eval_plans(
                self.validation_ids, eval_batch(self.loader.device, self.config.data.image_size), self.rank, self.world
            )
        )

    def trained(self, model: torch.nn.Module) -> torch.nn.Module:
        """Returns the part of `model` that takes batches of `reader`: the head over a frozen base, else all of it."""
        return model if self.reader is self.loader else Head(model)  # type: ignore[arg-type]
