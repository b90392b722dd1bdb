"""What the student deck states of its two networks, and what was chosen where it is silent."""

from dataclasses import dataclass

from cifar_dist.config import Config


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The deck's numbers and settings of one network. `accuracy` is on CIFAR-10, by split, as a share."""

    num_parameters: int
    accuracy: dict[str, float]
    settings: dict[str, object]  # by their names in Config


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


def choices(config: Config) -> dict[str, str]:
    """What the run has where the deck is silent, by subject: one sentence each."""
    data, optim, loop = config.data, config.optim, config.loop
    warmup = f" after a warm-up of {optim.warmup_fraction:.0%} of the steps" if optim.warmup_fraction else ""
    smoothing = f" with label smoothing {optim.label_smoothing:g}" if optim.label_smoothing else ""
    chosen = {
        "input range": f"{data.input_range}: the deck's code has no preprocessing",
        "validation split": f"{data.validation_fraction:.0%} of each class of train, drawn with seed {data.split_seed}",
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}{warmup} (Keras's default for Adam is 0.001)",
        "loss": f"cross-entropy of the softmax with the class number{smoothing}",
        "seeds": f"{loop.seed} for weights, order, augmentation and dropout",
    }
    if data.flips == "both":
        chosen["flips"] = "each direction by a draw of its own, as in Keras 2; Keras 3 has one draw for both"
    return chosen


def differences(config: Config) -> dict[str, str]:
    """What the run has other than the deck states, by setting: 'X (deck: Y)'."""
    values = {name: value for section in config.to_dict().values() for name, value in section.items()}
    stated = DECK[config.model.model].settings
    return {name: f"{values[name]} (deck: {value})" for name, value in stated.items() if values[name] != value}
