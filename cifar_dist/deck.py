"""What the student deck states of its two networks, and what was chosen where it is silent."""

from dataclasses import dataclass
from typing import Any

from cifar_dist.config import FREE_ON_RESUME, Config, option_fields


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The deck's numbers and settings of one network. `accuracy` is on CIFAR-10, by split, as a share."""

    num_parameters: int
    accuracy: dict[str, float]
    settings: dict[str, Any]  # by their names in Config


DECK = {
    "fan": Statement(
        num_parameters=87_316_426,
        accuracy={"train": 0.9779, "validation": 0.7804, "test": 0.7600},
        settings={"image_size": 32, "flips": "none", "optimizer": "adam", "global_batch_size": 64, "epochs": 30},
    ),
    "resnet50v2": Statement(
        num_parameters=26_159_370,
        accuracy={"train": 0.9559, "validation": 0.8922, "test": 0.8451},
        settings={
            "image_size": 224,
            "flips": "both",
            "finetune": False,
            "optimizer": "adam",
            "global_batch_size": 128,
            "epochs": 3,
        },
    ),
}


# Settings that the deck leaves open, see choices(), and settings that hardly change what is learned.
OPEN = {
    *("input_range", "validation_fraction", "split_seed", "learning_rate", "schedule", "warmup_fraction"),
    *("muon_learning_rate", "seed", "precision", "memory_format", "compile", "gradient_dtype", "deterministic"),
    *("label_smoothing", "weights", "accumulation_steps"),
}


def choices(config: Config) -> dict[str, str]:
    """What was chosen for the run where the deck is silent: by subject, a sentence each."""
    data, optim, loop = config.data, config.optim, config.loop
    muon = f", {optim.muon_learning_rate:g} for the convolutions by Muon" if optim.optimizer == "muon" else ""
    warmup = f" after a warm-up of {100 * optim.warmup_fraction:g}% of the steps" if optim.warmup_fraction else ""
    smoothing = f" with label smoothing {optim.label_smoothing:g}" if optim.label_smoothing else ""
    share = f"{100 * data.validation_fraction:g}%"
    chosen = {
        "input range": f"{data.input_range}: the deck's code has no preprocessing",
        "validation split": f"{share} of each class of train, drawn with seed {data.split_seed}",
        "learning rate": f"{optim.learning_rate:g}{muon}, {optim.schedule}{warmup} (Keras's default for Adam is 0.001)",
        "loss": f"cross-entropy of the softmax with the class number{smoothing}",
        "seeds": f"{loop.seed} for weights that are not loaded, order, augmentation and dropout",
    }
    if data.flips == "both":
        chosen["flips"] = "each direction by a draw of its own, as in Keras 2; Keras 3 has one draw for both"
    return chosen


def differences(config: Config, weights: dict[str, Any] | None) -> dict[str, str]:
    """The settings in which the run differs from the deck, each as 'X (deck: Y)'. `weights`: what the run card says of
    the start weights.

    The deck's value is what it states, or Keras's default for a setting that it does not mention. A setting that the
    deck leaves open is no difference.
    """
    deck, found = Config().replace(model=config.model.model, **DECK[config.model.model].settings), {}
    for name, (section, _) in option_fields().items():
        mine, theirs = (getattr(getattr(c, section), name) for c in (config, deck))
        if mine != theirs and name not in OPEN | FREE_ON_RESUME - {"epochs"}:
            found[name] = f"{mine} (deck: {theirs})"
    if config.model.model == "resnet50v2" and not (weights and weights["is_imagenet"]):
        found["weights"] = f"{weights['uri'] if weights else 'random'} (deck: ImageNet's)"
    return found
