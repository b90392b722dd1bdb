"""A run's figures for Prometheus: gauges that Ray exports at the metrics endpoint of the driver's node."""

from typing import Any

from ray.util.metrics import Gauge

# The gauge ray_cifar_dist_NAME (Ray adds the `ray_`) -> what it says. The first ones are values of metrics.jsonl.
GAUGES = {
    "images_per_second": "Images trained per second by all workers together, since the epoch's start",
    "train_loss": "Mean training loss of this epoch so far",
    "train_accuracy": "Share of training images classified correctly, this epoch so far",
    "validation_loss": "Mean validation loss after the last epoch",
    "validation_accuracy": "Share of validation images classified correctly after the last epoch",
    "learning_rate": "Learning rate of the last step",
    "data_wait_share": "Share of the epoch's time that rank 0 waited for input",
    "communication_share": "Share of the epoch's time that rank 0 waited for the other workers' gradients",
    "checkpoint_stall_seconds": "Seconds that checkpoints held up training in the last epoch",
    "epoch": "Epoch that is being trained, from 0",
    "global_step": "Steps trained since the run's beginning",
    "num_workers": "Workers that train",
    "recoveries": "How often the run was started again, by Ray Train or by a new driver",
}


class Telemetry:
    """The gauges of one run, by its name and network; they are there as long as the process that set them."""

    def __init__(self, run: str, model: str) -> None:
        tags = {"run": run, "model": model}
        self._gauges = {
            name: Gauge(f"cifar_dist_{name}", text, tuple(tags)).set_default_tags(tags) for name, text in GAUGES.items()
        }

    def set(self, values: dict[str, Any]) -> None:
        """Sets the gauges that `values` (as in a line of metrics.jsonl) has a number for."""
        if values.get("seconds"):
            values = {**values, "communication_share": values["communication_seconds"] / values["seconds"]}
        for name in GAUGES.keys() & values.keys():
            self._gauges[name].set(values[name])
