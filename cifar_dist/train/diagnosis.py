"""Interprets the metrics of a run: warnings about learning, and the bottleneck of its speed."""

import math
from typing import Any

import torch

from cifar_dist.data import order
from cifar_dist.run.network import weights_notice
from cifar_dist.run.splits import validation_source
from cifar_dist.train.images import Images
from cifar_dist.train.job import Plan
from cifar_dist.train.optim import schedule_factor
from cifar_dist.train.reporting import Place, Reporter
from cifar_dist.train.state import TrainState
from cifar_dist.train.validation import Validation

GOOD_PER_MICRO_BATCH = 8  # images
NUM_BATCHES = 20  # of training images, to re-estimate lagging statistics
BOUND_SHARE = 0.1  # of the training time; less waiting than this is not worth reducing


def batch_warning(num_images: int, global_batch_size: int, world: int, accumulation_steps: int) -> str | None:
    """Returns a warning if steps give BatchNorm too few images to estimate mean and variance."""
    fewest = order.fewest_per_micro_batch(min(global_batch_size, num_images), world, accumulation_steps)
    if fewest < GOOD_PER_MICRO_BATCH:
        return (
            f"each worker has only {fewest} images at a time, and BatchNorm takes their mean and variance for those of "
            f"all; from {GOOD_PER_MICRO_BATCH} on they are fair: raise --global-batch-size, or lower --workers or "
            "--accumulation-steps"
        )
    if num_images % global_batch_size == 1:
        return (
            "the last step of each epoch has a single image, from which nothing is learned: BatchNorm over a single "
            "value makes every gradient behind it 0; change --global-batch-size or --train-images by one"
        )
    return None


def length_warning(old_epochs: int, epochs: int, step: int, old_rate: float, rate: float) -> str:
    """Returns a warning for a schedule that is lengthened or shortened in the middle of a run."""
    return (
        f"--epochs was {old_epochs} and is {epochs} now, so the schedule of the learning rate has another length: at "
        f"step {step} the rate jumps from {old_rate:.3g} to {rate:.3g}. To have it run down once only, train anew "
        "under another --name; --schedule constant has no such jump"
    )


def chance_warning(accuracy: float, num_seen: int, num_classes: int) -> str | None:
    """Returns a warning if training accuracy over `num_seen` images is within 3 standard errors of chance."""
    chance = 1 / num_classes
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / num_seen)
    if accuracy > limit or limit > (1 + chance) / 2:  # too few images to tell
        return None
    return (
        f"training accuracy is {accuracy:.1%}, chance is {chance:.1%}: the network is not learning. Likely causes: a "
        "learning rate that is too high or too low, an --input-range that the weights were not made for, or labels "
        "that do not belong to their images"
    )


def validation_lags(train: float, validation: float, num_classes: int) -> bool:
    """Whether validation accuracy stays near chance while training accuracy does not.

    True if training is above twice chance, and validation gained less than a third of training's gain over chance."""
    chance = 1 / num_classes
    return train > min(2 * chance, (1 + chance) / 2) and validation - chance < (train - chance) / 3


def average_warning(train: float, validation: float, plain: float, decay: float) -> str | None:
    """Returns a warning if validation lags because the weight average lags. `plain`: accuracy of the weights."""
    if plain - validation <= (train - validation) / 3:
        return None
    return (
        f"validation accuracy is {validation:.1%} by the average of the weights, while training accuracy is "
        f"{train:.1%}. The weights themselves reach {plain:.1%}: the average lags behind them (--ema-decay {decay:g} "
        f"looks back {1 / (1 - decay):.0f} steps), the network itself is sound. A lower --ema-decay, or "
        "more steps, mend it"
    )


def validation_warning(train: float, validation: float, recalibrated: float, num_classes: int, momentum: float) -> str:
    """Returns the likely cause of lagging validation. `recalibrated`: accuracy with re-estimated BatchNorm."""
    found = (
        f"validation accuracy is {validation:.1%}, near chance ({1 / num_classes:.1%}), while training accuracy is "
        f"{train:.1%}. With BatchNorm's statistics re-estimated the same weights reach {recalibrated:.1%}: "
    )
    if recalibrated - validation > (train - validation) / 3:
        return found + (
            f"the moving statistics lag behind the weights (momentum {momentum:g}), the network itself is sound. It "
            "heals over some hundreds of steps; --recalibrate-batches 20 or a lower --batchnorm-momentum does it now"
        )
    return found + (
        "so it is not BatchNorm's moving statistics. Likely causes: overfitting (too few images, or none flipped), or "
        "validation images unlike the training images"
    )


def bottleneck_verdict(seconds: float, data_wait_seconds: float, communication_seconds: float) -> str:
    """Returns a run's bottleneck: input or communication if training waited for it BOUND_SHARE of the time, else
    compute."""
    shares = {"input": data_wait_seconds / seconds, "communication": communication_seconds / seconds}
    worst = max(shares, key=lambda name: shares[name])
    bound = worst if shares[worst] >= BOUND_SHARE else "compute"
    advice = {
        "input": "; --cache decoded, --dali-threads or more CPUs per worker feed it faster",
        "communication": "; a larger --global-batch-size or --gradient-dtype bf16 relieves it",
        "compute": "",
    }
    return (
        f"{bound}-bound: {1 - sum(shares.values()):.1%} computing, {shares['input']:.1%} waiting for input, "
        f"{shares['communication']:.1%} for gradients of other workers, of {seconds:.1f} s of training{advice[bound]}"
    )


def schedule_warning(state: TrainState, meta: dict[str, Any]) -> str | None:
    """Returns a warning if --epochs differs from the checkpoint's, and so changes the learning rate at this step."""
    config = state.config
    old, new = meta["config"]["loop"]["epochs"], config.loop.epochs
    # A step after the old run's end has the learning rate of the old run's last step.
    num_old, step = old * state.steps_per_epoch, min(state.global_step, old * state.steps_per_epoch - 1)
    before = schedule_factor(config.optim, step, num_old) * config.optim.learning_rate
    after = schedule_factor(config.optim, step, new * state.steps_per_epoch) * config.optim.learning_rate
    return None if old == new or before == after else length_warning(old, new, state.global_step, before, after)


def announce(reporter: Reporter, plan: Plan, images: Images, *, is_resumed: bool) -> None:
    """Prints what is trained, and warns of problems that are known before the first step."""
    config, state = plan.config, reporter.state
    num_train, num_validation = len(images.train_ids), len(images.validation_ids)
    reporter.say(
        f"training {config.model.model} on {num_train} images, validating on {num_validation}: {state.world} "
        f"workers of {state.num_threads} CPU threads each, {state.device.type}, {state.precision.name}"
    )
    reporter.say(f"validation images: {validation_source(config, plan.data.manifest)}")
    if not is_resumed and (notice := weights_notice(config, plan.weights)):
        reporter.say(f"WARNING: {notice}")
    batch, micro_batches = config.loop.global_batch_size, config.loop.accumulation_steps
    if message := batch_warning(num_train, batch, state.world, micro_batches):
        reporter.warn("few_images_at_a_time", message)
    if config.data.synthetic_data:
        reporter.say("WARNING: --synthetic-data: training images are random, nothing is learned")


class Diagnosis:
    """Warns during training. All ranks call each method at the same time."""

    def __init__(self, state: TrainState, num_classes: int, reporter: Reporter, validation: Validation) -> None:
        self.state, self.num_classes, self.reporter, self.validation = state, num_classes, reporter, validation
        self._is_done = False

    def check_training(self, accuracy: float, num_seen: int, place: Place) -> None:
        """Warns if training accuracy, measured at `place`, is still at chance after `chance_warning_steps`."""
        after = self.state.config.loop.chance_warning_steps
        message = chance_warning(accuracy, num_seen, self.num_classes)
        if message and 0 < after <= place.global_step:
            self.reporter.warn("train_at_chance", message, place)

    def check_validation(self, model: torch.nn.Module, train: float, validation: float) -> None:
        """If only validation stays near chance, warns whether the weight average or BatchNorm's statistics lag."""
        config = self.state.config
        lags = validation_lags(train, validation, self.num_classes)
        if self._is_done or not config.loop.chance_warning_steps or not lags:
            return
        self._is_done = True
        if model is not self.state.model:  # the average of the weights
            plain = self._accuracy(self.state.model)
            if message := average_warning(train, validation, plain, config.optim.ema_decay):
                self.reporter.warn("average_lags", message, plain_accuracy=plain)
                return
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.validation.recalibrate(model, NUM_BATCHES)
        found = self._accuracy(model)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        message = validation_warning(train, validation, found, self.num_classes, config.model.batchnorm_momentum)
        self.reporter.warn("validation_near_chance", message, recalibrated_accuracy=found)

    def _accuracy(self, model: torch.nn.Module) -> float:
        _, num_correct, num_seen = self.validation.totals(model)
        return num_correct / num_seen
