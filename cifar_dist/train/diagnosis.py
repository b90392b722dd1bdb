"""What a run's figures mean: warnings, and what bounds its speed."""

import math

from cifar_dist.data import order

GOOD_PER_MICRO_BATCH = 8  # images
BOUND_SHARE = 0.1  # of the time, from which on waiting is worth mending


def batch_warning(num_images: int, global_batch_size: int, world: int, accumulation_steps: int) -> str | None:
    """What to say of steps in which BatchNorm has too few images to tell their mean and variance."""
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
    """What to say where a schedule is stretched or cut short in the middle of a run."""
    return (
        f"--epochs was {old_epochs} and is {epochs} now, so the schedule of the learning rate has another length: at "
        f"step {step} the rate jumps from {old_rate:.3g} to {rate:.3g}. To have it run down once only, train anew "
        "under another --name; --schedule constant has no such jump"
    )


def chance_warning(accuracy: float, num_seen: int, num_classes: int) -> str | None:
    """What to say of a training accuracy over `num_seen` images that is within 3 standard errors of chance."""
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
    """Whether validation accuracy stays near chance while training accuracy does not: training is at twice chance or
    better, and validation has less than a third of what training has gained over chance."""
    chance = 1 / num_classes
    return train > min(2 * chance, (1 + chance) / 2) and validation - chance < (train - chance) / 3


def average_warning(train: float, validation: float, plain: float, decay: float) -> str | None:
    """What to say if validation lags because the average of the weights does: `plain` is the accuracy of the weights
    themselves."""
    if plain - validation <= (train - validation) / 3:
        return None
    return (
        f"validation accuracy is {validation:.1%} by the average of the weights, while training accuracy is "
        f"{train:.1%}. The weights themselves reach {plain:.1%}: the average lags behind them (--ema-decay {decay:g} "
        f"looks back {1 / (1 - decay):.0f} steps), the network itself is sound. A lower --ema-decay, or "
        "more steps, mend it"
    )


def validation_warning(train: float, validation: float, recalibrated: float, num_classes: int, momentum: float) -> str:
    """What lagging validation comes from; `recalibrated` is its accuracy with BatchNorm's statistics re-estimated."""
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
    """What bounds a run: input or communication if training waited for it a tenth of the time or more, else compute."""
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
