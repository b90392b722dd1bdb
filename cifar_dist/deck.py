"""The student deck's statements on its two networks, and the choices made where the deck is silent."""

from typing import Any

from cifar_dist.config import FREE_ON_RESUME, Config, option_fields
from cifar_dist.models.spec import MODELS, DeckResults

DECK: dict[str, DeckResults] = {name: spec.deck for name, spec in MODELS.items() if spec.deck}
# Settings that the deck leaves open (see choices()), and settings that hardly change what is learned.
OPEN = {
    "input_range",
    "validation_fraction",
    "split_seed",
    "learning_rate",
    "schedule",
    "warmup_fraction",
    "muon_learning_rate",
    "seed",
    "precision",
    "memory_format",
    "compile",
    "gradient_dtype",
    "deterministic",
    "label_smoothing",
    "weights",
    "accumulation_steps",
}


def choices(config: Config, *, own_validation: bool = False) -> dict[str, str]:
    """Returns the run's choices where the deck is silent: a sentence by subject.

    `own_validation`: the data set has a validation split of its own."""
    data, optim, loop = config.data, config.optim, config.loop
    muon = f", {optim.muon_learning_rate:g} for the convolutions by Muon" if optim.optimizer == "muon" else ""
    warmup = f" after a warm-up of {100 * optim.warmup_fraction:g}% of the steps" if optim.warmup_fraction else ""
    smoothing = f" with label smoothing {optim.label_smoothing:g}" if optim.label_smoothing else ""
    drawn = f"{100 * data.validation_fraction:g}% of each class of train, drawn with seed {data.split_seed}"
    chosen = {
        "input range": f"{data.input_range}: the deck's code has no preprocessing",
        "validation split": "the data set's own" if own_validation else drawn,
        "learning rate": f"{optim.learning_rate:g}{muon}, {optim.schedule}{warmup} (Keras's default for Adam is 0.001)",
        "loss": f"cross-entropy of the softmax with the class number{smoothing}",
        "seeds": f"{loop.seed} for weights that are not loaded, order, augmentation and dropout",
    }
    if data.flips == "both":
        chosen["flips"] = "each direction by a draw of its own, as in Keras 2; Keras 3 has one draw for both"
    return chosen


def differences(config: Config, weights: dict[str, Any] | None) -> dict[str, str]:
    """Returns the settings in which the run differs from the deck, each as 'X (deck: Y)'.

    `weights`: the run card's entry for the start weights. For a setting that the deck does not mention, its value is
    Keras's default. Settings that the deck leaves open do not count as differences.
    """
    stated = DECK.get(config.model.model)
    deck, found = Config().replace(model=config.model.model, **(stated.settings if stated else {})), {}
    for name, (section, _) in option_fields().items():
        mine, theirs = (getattr(getattr(c, section), name) for c in (config, deck))
        if mine != theirs and name not in OPEN | FREE_ON_RESUME - {"epochs"}:
            found[name] = f"{mine} (deck: {theirs})"
    if MODELS[config.model.model].has_base and not (weights and weights["is_imagenet"]):
        found["weights"] = f"{weights['uri'] if weights else 'random'} (deck: ImageNet's)"
    return found
