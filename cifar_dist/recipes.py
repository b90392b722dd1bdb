"""Named settings as functions; each docstring says what the recipe is for and what it leaves open."""

from collections.abc import Callable

from cifar_dist.config import Config, nearest
from cifar_dist.errors import UserError


def deck_fan() -> Config:
    """Fan as the deck trains it: Adam 1e-3, batch 64, 30 epochs, both flips, BatchNorm momentum 0.99.

    What the deck leaves open: the input range (chosen: 0..1; Fan's first BatchNorm takes out scale and offset, so that
    -1..1 and 0..255 train alike, but for a far larger validation loss at 0..255 while the moving statistics lag); the
    places of its six dropouts (chosen: after the first six convolution blocks); the size of the validation split
    (chosen: 10%, drawn by class).
    """
    return Config().replace(model="fan", epochs=30, global_batch_size=64)


def deck_resnet50v2() -> Config:
    """ResNet50V2 as the deck trains it: frozen base at 224 px, Adam 1e-3, batch 128, 3 epochs, both flips.

    Give it ImageNet's `weights`. What the deck leaves open: the input range (chosen: -1..1, on which those weights were
    trained; at 0..1 or 0..255, which the deck may have used, the frozen base computes features it was never trained
    for); an activation after the head's Conv2D (chosen: none, Keras's default); the pooling (chosen: global average,
    the only one with the deck's 26,159,370 parameters); the size of the validation split (chosen: 10%, drawn by class).
    """
    return Config().replace(model="resnet50v2", epochs=3, global_batch_size=128, image_size=224, input_range="-1..1")


def finetune_resnet50v2() -> Config:
    """deck_resnet50v2 with its base trained too, at a rate of 1e-4 that falls to 0; start it from ImageNet --weights.

    Not the deck's settings. BatchNorm's momentum is 0.9, since 0.99 needs hundreds of steps before validation means
    anything.
    """
    return deck_resnet50v2().replace(finetune=True, learning_rate=1e-4, schedule="cosine", batchnorm_momentum=0.9)


def best_fan() -> Config:
    """Fan trained as fast per epoch as we know how: Muon, a triangular rate, horizontal flips; not the deck's settings.

    docs/fidelity.md has what each choice brings, measured. Crop, cutout and the average of
    weights are left out: they are known to pay in long runs, and were not measured in two epochs.
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
    """Fan on a few hundred images within minutes on two cores; not the deck's settings.

    BatchNorm momentum 0.8: 0.99 needs hundreds of steps before validation means anything.
    """
    return deck_fan().replace(
        epochs=2, global_batch_size=32, batchnorm_momentum=0.8, validation_fraction=0.15, log_every_steps=5
    )


def quickstart_resnet50v2() -> Config:
    """ResNet50V2 with a frozen base at 96 px within minutes on two cores; not the deck's settings."""
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
    for recipe in (
        *(deck_fan, deck_resnet50v2, finetune_resnet50v2, best_fan),
        *(quickstart_fan, quickstart_resnet50v2),
    )
}


def recipe_config(name: str, **overrides: object) -> Config:
    """The recipe's settings with overrides by short name; a UserError names the nearest recipe."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; there are {', '.join(RECIPES)}")
    return RECIPES[name]().replace(**overrides)


def describe_recipes() -> str:
    """One line per recipe, for --help."""
    return "\n".join(f"  {name:24}{(f.__doc__ or '').splitlines()[0]}" for name, f in RECIPES.items())
