"""Validates a run's network over all ranks."""

import torch

from cifar_dist.run.checkpoint import Cursor
from cifar_dist.train.images import Images
from cifar_dist.train.loop import sum_over_ranks, validate
from cifar_dist.train.moving_statistics import average_batchnorm_over_ranks, recalibrate_batchnorm
from cifar_dist.train.state import TrainState


class Validation:
    """Validates and recalibrates. All ranks call each method at the same time, because its results are exchanged."""

    def __init__(self, state: TrainState, images: Images) -> None:
        self.state, self.images = state, images

    def network(self) -> torch.nn.Module:
        """Returns the model to validate: the average of the weights if the run has one, else the model.

        Makes the moving statistics equal on all ranks."""
        average_batchnorm_over_ranks(self.state.model)
        if self.state.average is None:
            return self.state.model
        average_batchnorm_over_ranks(self.state.average.module)
        return self.state.average.module

    def totals(self, model: torch.nn.Module) -> list[float]:
        """Returns [loss sum, correct, seen] over the validation images of all ranks."""
        state, batches = self.state, self.images.validation_batches()
        return sum_over_ranks(validate(self.images.trained(model), batches, state.precision, state.input_of)).tolist()

    def recalibrate(self, model: torch.nn.Module, num_batches: int) -> None:
        """Re-estimates the moving statistics from the first training batches of the epoch."""
        batches = self.images.train_batches(Cursor(self.state.cursor.epoch, 0))
        trained = self.images.trained(model)
        recalibrate_batchnorm(trained, batches, num_batches, self.state.precision, self.state.input_of)
