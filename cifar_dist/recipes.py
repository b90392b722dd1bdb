"""Named settings as functions. Each docstring gives the recipe's purpose and the choices made."""

from collections.abc import Callable

from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.models.spec import MODELS
from cifar_dist.options import nearest


def of_the_deck(name: str) -> Config:
    """What the deck states of a network, in the input range of its ModelSpec."""
    spec = MODELS[name]
    return Config().replace(model=name, input_range=spec.input_range, **(spec.deck.settings if spec.deck else {}))


def deck_fan() -> Config:
    """Fan as the deck trains it: Adam, batch 64, 30 epochs, no flips.

    Its layers are the deck's code, line by line. Where the deck is silent: the input range (chosen: 0..1; Fan's first
    BatchNorm takes out scale and offset); the validation split (chosen: 10% of each class); the learning rate (chosen:
    1e-3, Keras's default for Adam); the loss (chosen: cross-entropy); the seeds.
    """
    return of_the_deck("fan")


def deck_resnet50v2() -> Config:
    """ResNet50V2 as the deck trains it: frozen base, 224 px, Adam, batch 128, 3 epochs.

    Images are flipped in both directions. Give it ImageNet's `weights`. Where the deck is silent: the input range
    (chosen: -1..1, for which those weights were made; at 0..1 or 0..255, which the deck may have used, the frozen base
    gets inputs that it was never trained on); whether the two flips are drawn together (chosen: independently, as
    Keras 2 does; docs/fidelity.md); the validation split (chosen: 10% of each class); the learning rate (chosen: 1e-3,
    Keras's default for Adam); the loss (chosen: cross-entropy); the seeds.
    """
    return of_the_deck("resnet50v2")


def finetune_resnet50v2() -> Config:
    """deck_resnet50v2 with its base trained too; start it from ImageNet --weights.

    The learning rate of 1e-4 falls to 0. Not the deck's settings. BatchNorm's momentum is 0.9, since at 0.99 validation
    is meaningless for hundreds of steps. The recipe's accuracy has not been measured.
    """
    return deck_resnet50v2().replace(finetune=True, learning_rate=1e-4, schedule="cosine", batchnorm_momentum=0.9)


def best_fan() -> Config:
    """Fan trained for accuracy in two epochs: Muon, a triangular rate, horizontal flips.

    Not the deck's settings. The settings were chosen by single runs on 10,000 images. benchmarks/ablation.py can
    measure the effect of each setting; that has not been done.
    """
    return deck_fan().replace(
        epochs=2,
        input_range="-1..1",
        flips="horizontal",
        optimizer="muon",
        muon_learning_rate=0.035,
        schedule="one-cycle",
        warmup_fraction=0.2,
        batchnorm_momentum=0.9,
        recalibrate_batches=20,
    )


def quickstart_fan() -> Config:
    """Fan on a few hundred images within minutes on two cores.

    Not the deck's settings. BatchNorm momentum is 0.8, since at 0.99 validation is meaningless for hundreds of steps.
    """
    return deck_fan().replace(
        epochs=2, global_batch_size=32, batchnorm_momentum=0.8, validation_fraction=0.15, log_every_steps=5
    )


def quickstart_resnet50v2() -> Config:
    """ResNet50V2 with a frozen base at 96 px within minutes on two cores.

    Not the deck's settings.
    """
    return deck_resnet50v2().replace(
        epochs=5,
        global_batch_size=32,
        image_size=96,
        batchnorm_momentum=0.8,
        validation_fraction=0.15,
        log_every_steps=5,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (deck_fan, deck_resnet50v2, finetune_resnet50v2, best_fan, quickstart_fan, quickstart_resnet50v2)
}


def recipe_config(name: str, **overrides: object) -> Config:
    """Returns the recipe's settings with overrides by short name. Raises UserError with the nearest recipe."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]().replace(**overrides)


def describe_recipes() -> str:
    """Returns a line per recipe, for --help."""
    return "\n".join(f"  {name:24}{(f.__doc__ or '').splitlines()[0]}" for name, f in RECIPES.items())
