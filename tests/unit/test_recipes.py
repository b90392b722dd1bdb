"""Every setting that a recipe learns with, by itself or by a default of Config."""

import pytest

from cifar_dist.config import FREE_ON_RESUME, Config
from cifar_dist.deck import DECK, differences
from cifar_dist.recipes import RECIPES, recipe_config

# What deck_fan has, also where the deck is silent; what is free on resume does not change what is learned.
DECK_FAN = {
    **{"model": "fan", "finetune": False, "batchnorm_momentum": 0.99},
    **{"image_size": 32, "resize": "squash", "antialias": False, "input_range": "0..1"},
    **{"flips": "none", "crop_padding": 0, "cutout_size": 0},
    **{"validation_fraction": 0.1, "split_seed": 0, "train_images": 0, "synthetic_data": False},
    **{"optimizer": "adam", "learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
    **{"weight_decay": 0.0, "decay_bias_and_norm": True, "momentum": 0.9, "muon_learning_rate": 0.02},
    **{"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-7},
    **{"clip_norm": 0.0, "label_smoothing": 0.0, "ema_decay": 0.0},
    **{"epochs": 30, "global_batch_size": 64, "accumulation_steps": 1, "seed": 0, "recalibrate_batches": 0},
    **{"precision": "auto", "memory_format": "auto", "compile": "auto", "gradient_dtype": "fp32"},
    **{"deterministic": False},
}
DECK_RESNET = DECK_FAN | {
    **{"model": "resnet50v2", "image_size": 224, "input_range": "-1..1", "flips": "both"},
    **{"epochs": 3, "global_batch_size": 128},
}
QUICK = {"global_batch_size": 32, "batchnorm_momentum": 0.8, "validation_fraction": 0.15}
EXPECTED = {
    "deck_fan": DECK_FAN,
    "deck_resnet50v2": DECK_RESNET,
    "quickstart_fan": DECK_FAN | QUICK | {"epochs": 2},
    "quickstart_resnet50v2": DECK_RESNET | QUICK | {"epochs": 5, "image_size": 96},
    "finetune_resnet50v2": DECK_RESNET
    | {"finetune": True, "batchnorm_momentum": 0.9, "learning_rate": 1e-4, "schedule": "cosine"},
    "best_fan": DECK_FAN
    | {
        **{"batchnorm_momentum": 0.9, "input_range": "-1..1", "flips": "horizontal", "recalibrate_batches": 20},
        **{"optimizer": "muon", "muon_learning_rate": 0.035, "schedule": "one-cycle", "warmup_fraction": 0.2},
        **{"epochs": 2},
    },
}


def learned_with(config: Config) -> dict[str, object]:
    values = {name: value for section in config.to_dict().values() for name, value in section.items()}
    return {name: value for name, value in values.items() if name not in FREE_ON_RESUME or name == "epochs"}


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_every_recipe(name):
    assert learned_with(recipe_config(name)) == EXPECTED[name]


def test_a_recipe_s_differences_from_the_deck_are_said():
    imagenet = {"is_imagenet": True}
    assert [differences(recipe_config(f"deck_{name}"), imagenet) for name in DECK] == [{}, {}]
    quick = differences(recipe_config("quickstart_resnet50v2", flips="horizontal"), None)
    assert quick == {
        "batchnorm_momentum": "0.8 (deck: 0.99)",
        "image_size": "96 (deck: 224)",
        "flips": "horizontal (deck: both)",
        "global_batch_size": "32 (deck: 128)",
        "epochs": "5 (deck: 3)",
        "weights": "random (deck: ImageNet's)",
    }
