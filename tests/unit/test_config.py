"""Options: types, ranges, nearest suggestions, short and dotted spellings, recipes, and the command line itself."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.cli.train import TRAINING
from cifar_dist.command_line import Command
from cifar_dist.config import FREE_ON_RESUME, Config, option_fields
from cifar_dist.deck import choices, differences
from cifar_dist.errors import UserError
from cifar_dist.options import nearest
from cifar_dist.recipes import RECIPES, describe_recipes, recipe_config

ROOT = Path(__file__).parents[2]


COMMAND = Command(description="A job.", sections=TRAINING, examples="")


def parse(*words: str) -> dict:
    return dict(COMMAND.parse(list(words), "job").values)


# Values.


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("epochs", 1.5, "int"),
        ("epochs", "3", "int"),
        ("epochs", True, "int"),
        ("seed", None, "int"),
        ("learning_rate", "fast", "float"),
        ("learning_rate", True, "float"),
        ("finetune", 1, "bool"),
        ("flips", True, "str"),
        ("model", 3, "str"),
    ],
)
def test_wrong_type_names_option_type_and_value(name, value, kind):
    with pytest.raises(UserError) as error:
        Config().replace(**{name: value})
    assert f"--{name.replace('_', '-')} takes a value of type {kind}, not {value!r}" in str(error.value)


def test_whole_number_is_a_float():
    rate = Config().replace(learning_rate=1).optim.learning_rate
    assert (rate, type(rate)) == (1.0, float)


NUMBERS = [
    (name, bound, direction)
    for name, (_, f) in option_fields().items()
    for bound, direction in ((f.metadata["minimum"], -1), (f.metadata["maximum"], 1))
    if bound is not None and name != "image_size"
]


@pytest.mark.parametrize(("name", "bound", "direction"), NUMBERS)
def test_bounds_are_allowed_and_what_lies_beyond_is_not(name, bound, direction):
    section, f = option_fields()[name]
    kind = f.type
    assert getattr(getattr(Config().replace(**{name: kind(bound)}), section), name) == bound
    beyond = kind(bound + direction * (1 if kind is int else 1e-6))
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} takes a value (from|of)"):
        Config().replace(**{name: beyond})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", 0), ("global_batch_size", 0), ("accumulation_steps", 0), ("keep_checkpoints", 0)),
        *(("learning_rate", -0.1), ("validation_fraction", 0.0), ("beta2", 1.0), ("ema_decay", 1.0), ("seed", -1)),
        *(("crop_padding", -1), ("cutout_size", -1), ("muon_learning_rate", -0.1), ("recalibrate_batches", -1)),
        *(("checkpoint_every_steps", -1), ("checkpoint_every_seconds", -1.0), ("storage_retry_seconds", -1.0)),
    ],
)
def test_values_that_make_no_sense_are_refused(name, value):
    """Written out, so that a bound lost from the definition is noticed."""
    with pytest.raises(UserError, match="takes a value"):
        Config().replace(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["learning_rate", "clip_norm", "beta1"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} takes a value"):
        Config().replace(**{name: value})


def test_unknown_value_names_the_choices_and_the_nearest():
    with pytest.raises(UserError) as error:
        Config().replace(schedule="cosin")
    assert str(error.value) == ("--schedule is one of constant, cosine, one-cycle, not 'cosin' (did you mean cosine?)")


def test_unknown_setting_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown setting 'learing_rate' \(did you mean learning_rate\?\)"):
        Config().replace(learing_rate=0.1)


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("qqqq", ["epochs", "seed"]) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "fan", "image_size": 64}, "--image-size must be 32"),
        ({"model": "fan", "finetune": True}, "--finetune is for resnet50v2"),
        ({"model": "resnet50v2", "image_size": 95}, "96 or more"),
        ({"crop_padding": 32}, "--crop-padding and --cutout-size must be less than --image-size 32"),
        ({"cutout_size": 40}, "--crop-padding and --cutout-size must be less than --image-size 32"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Config().replace(**settings)


def test_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().loop.epochs = 3


# Names and round trip.


def test_field_names_are_unique_over_the_sections():
    names = [f.name for section in dataclasses.fields(Config) for f in dataclasses.fields(section.default_factory)]
    assert sorted(names) == sorted(set(names)) == sorted(option_fields())


def test_a_checkpoint_of_before_the_resizes_was_squashed():
    values = Config().replace(image_size=32, flips="both").to_dict()
    del values["data"]["resize"], values["data"]["antialias"]
    assert Config.from_dict(values) == Config().replace(flips="both", resize="squash", antialias=False)


def test_settings_free_on_resume_are_settings():
    assert set(option_fields()) >= FREE_ON_RESUME


def changed(name: str) -> object:
    """A valid value that is not the default."""
    f = option_fields()[name][1]
    if f.metadata["choices"]:
        return next(c for c in f.metadata["choices"] if c != f.default)
    if f.type is bool:
        return not f.default
    if f.type is str:
        return "a.weights.h5"
    return 128 if name == "image_size" else f.default + 1 if f.type is int else f.default / 2 + 0.05


def test_round_trip_keeps_every_setting():
    values = {name: changed(name) for name in option_fields()} | {"features": "computed"}
    config = Config().replace(**values)
    stored = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(stored) == config
    assert {k: v for section in stored.values() for k, v in section.items()} == values
    cached = Config().replace(model="resnet50v2", image_size=96, features="cached")  # goes with few of the others
    assert Config.from_dict(cached.to_dict()) == cached


def test_stored_setting_of_another_version_is_an_error():
    stored = Config().to_dict()
    stored["loop"]["warp_factor"] = 9
    with pytest.raises(UserError, match="unknown setting 'warp_factor'"):
        Config.from_dict(stored)


# Recipes.


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_says_what_it_is_for(name):
    config = recipe_config(name, seed=7)
    assert config == RECIPES[name]().replace(seed=7)
    assert config.model.model in name
    assert RECIPES[name].__doc__.splitlines()[0] in describe_recipes()


@pytest.mark.parametrize(
    ("name", "batch", "epochs", "size", "flips"),
    [("deck_fan", 64, 30, 32, "none"), ("deck_resnet50v2", 128, 3, 224, "both")],
)
def test_deck_recipes_are_the_decks(name, batch, epochs, size, flips):
    config = recipe_config(name)
    assert config.data.flips == flips
    assert differences(config, {"is_imagenet": True}) == {}
    assert (config.loop.global_batch_size, config.loop.epochs, config.data.image_size) == (batch, epochs, size)
    assert (config.optim.optimizer, config.optim.learning_rate, config.optim.epsilon) == ("adam", 1e-3, 1e-7)
    assert (config.optim.beta1, config.optim.beta2, config.optim.schedule) == (0.9, 0.999, "constant")
    assert (config.model.batchnorm_momentum, config.model.finetune) == (0.99, False)
    extras = config.optim
    assert not any((extras.weight_decay, extras.clip_norm, extras.label_smoothing, extras.ema_decay))
    assert not any((config.data.crop_padding, config.data.cutout_size, config.loop.recalibrate_batches))


def test_what_differs_from_the_deck_and_what_it_leaves_open_are_said():
    """Flips are left open only where there are two: whether one draw serves both."""
    assert differences(recipe_config("best_fan", flips="none", optimizer="adam"), None) == {
        "batchnorm_momentum": "0.9 (deck: 0.99)",
        "recalibrate_batches": "20 (deck: 0)",
        "epochs": "2 (deck: 30)",
    }
    mine = {"uri": "/w.h5", "is_imagenet": False}
    assert differences(recipe_config("finetune_resnet50v2"), mine) == {
        "finetune": "True (deck: False)",
        "batchnorm_momentum": "0.9 (deck: 0.99)",
        "weights": "/w.h5 (deck: ImageNet's)",
    }
    changes = {"crop_padding": 4, "ema_decay": 0.5, "clip_norm": 1.0, "train_images": 500, "beta1": 0.8, "seed": 3}
    assert differences(recipe_config("deck_fan", **changes), None).keys() == changes.keys() - {"seed"}
    open_settings = ["input range", "validation split", "learning rate", "loss", "seeds"]
    assert list(choices(recipe_config("deck_fan"))) == open_settings
    assert list(choices(recipe_config("deck_resnet50v2"))) == [*open_settings, "flips"]
    said = choices(recipe_config("best_fan", label_smoothing=0.1, seed=7, split_seed=3, validation_fraction=0.125))
    assert said["input range"].startswith("-1..1: ")
    assert said["validation split"] == "12.5% of each class of train, drawn with seed 3"
    assert said["learning rate"].startswith(
        "0.001, 0.035 for the convolutions by Muon, one-cycle after a warm-up of 20% of the steps"
    )
    assert said["loss"].endswith(" with label smoothing 0.1")
    assert said["seeds"].startswith("7 ")


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown recipe 'dek_fan' \(did you mean deck_fan\?\)"):
        recipe_config("dek_fan")


# Command line.


def test_nothing_given_overrides_nothing():
    assert parse() == {}


@pytest.mark.parametrize("name", option_fields())
def test_every_option_has_a_short_and_a_dotted_form(name):
    value = changed(name)
    flag, section = name.replace("_", "-"), option_fields()[name][0]
    for spelling in (f"--{flag}", f"--{section}.{flag}", f"--{section}.{name}"):
        assert parse(spelling, str(value)) == {name: value}
    assert parse(f"--{flag}={value}") == {name: value}


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--finetune", "no"], False), (["--finetune", "ON"], True), (["--finetune", "--seed", "1"], True)],
)
def test_switches(words, value):
    assert parse(*words)[words[0].removeprefix("--")] is value


def test_values_may_begin_with_a_minus():
    words = ["--input-range", "-1..1", "--learning-rate", "-1e-3"]
    assert parse(*words) == {"input_range": "-1..1", "learning_rate": -1e-3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epcohs", "3"], "job: unknown option --epcohs (did you mean --epochs?)"),
        (["--epoch", "3"], "job: unknown option --epoch (did you mean --epochs?)"),  # not taken as an abbreviation
        (["--lop.epochs=3"], "job: unknown option --lop.epochs=3 (did you mean --loop.epochs?)"),
        (["--optimizer", "adm"], "'adm' is not one of adam, adamw, sgd, muon (did you mean adam?)"),
        (["--finetune", "maybe"], "'maybe' is neither true nor false"),
        (["--flips", "horizontl"], "'horizontl' is not one of none, horizontal, both (did you mean horizontal?)"),
        (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["--epochs"], "expected one argument"),
        (["stray"], "unknown option stray"),
    ],
)
def test_mistyped_words_end_with_2_and_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    text = capsys.readouterr().err
    assert end.value.code == 2
    assert message in text
    assert text.count("\n") == 1


NEEDED = ["--data", "no-data", "--storage", "no-storage", "--name", "run"]
REAL_RUNS = {
    "help": (["--help-all"], 0),
    "option": (["--recipe", "deck_fan", *NEEDED, "--epcohs", "3"], 2),
    "recipe": (["--recipe", "dek_fan", *NEEDED], 1),
}


@pytest.fixture(scope="module")
def real_runs() -> dict[str, tuple[int, str, str]]:
    """(exit code, stdout, stderr) of jobs/train.py, started together: most of their time is importing."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "jobs/train.py", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, (words, _) in REAL_RUNS.items()
    }
    ended = {name: process.communicate(timeout=300) for name, process in started.items()}
    return {name: (started[name].returncode, *ended[name]) for name in started}


@pytest.mark.parametrize("name", REAL_RUNS)
def test_real_exit_codes(real_runs, name):
    assert real_runs[name][0] == REAL_RUNS[name][1], real_runs[name]


def test_real_help_teaches_every_option_and_recipe(real_runs):
    _, text, errors = real_runs["help"]
    assert errors == ""
    for name, (_, f) in option_fields().items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in text
        assert f.default == "" or f"(default {f.default})" in " ".join(text.split())
    for name in RECIPES:
        assert f"  {name}" in text
    assert "python jobs/train.py --recipe" in text  # an example to copy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("option", "unknown option --epcohs (did you mean --epochs?)"),
        ("recipe", "unknown recipe 'dek_fan' (did you mean deck_fan?)"),
    ],
)
def test_real_mistakes_are_named_in_one_line(real_runs, name, message):
    _, text, errors = real_runs[name]
    assert message in errors
    assert (text, errors.count("\n")) == ("", 1)
