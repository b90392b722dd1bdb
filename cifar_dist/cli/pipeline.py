"""The main job: prepares a data set, trains both models, evaluates, reports. Run again, it continues."""

from dataclasses import dataclass
from typing import Any

from cifar_dist.cli.evaluate import evaluate, refuse_foreign
from cifar_dist.cli.prepare import prepare
from cifar_dist.cli.train import GUIDE, TRAINING, config_of, train_run
from cifar_dist.command_line import Command, Given
from cifar_dist.config import Config
from cifar_dist.errors import UserError
from cifar_dist.job_settings import EvaluationSettings, Launch, SourceSettings
from cifar_dist.models.spec import MODELS
from cifar_dist.options import Section, option
from cifar_dist.uris import join_uri, output_uri

SET_HERE = {"recipe", "data", "storage", "name"}


@dataclass(frozen=True, kw_only=True)
class Pipeline(Section):
    table, heading = "pipeline", "the whole job"

    out: str = option(help="shared folder for data, runs and report", metavar="URI", common=True)
    recipes: tuple[str, ...] = option(
        ("quickstart_fan", "quickstart_resnet50v2"), help="recipes to train", metavar="NAME", common=True
    )


def config_for(given: Given, recipe: str) -> Config:
    """Returns the recipe's settings. Only a network with published weights keeps --weights, as no file fits both."""
    config = config_of(given, recipe)
    return config if MODELS[config.model.model].has_base else config.replace(weights="")


def check_recipes(given: Given) -> dict[str, Any]:
    """Raises UserError for a recipe that the settings do not fit. Returns nothing: recipes differ in all settings."""
    for recipe in given.values.get("recipes", ()):
        config_for(given, recipe)
    return {}


COMMAND = Command(
    description=str(__doc__),
    sections=(Pipeline, SourceSettings, Launch, EvaluationSettings, *TRAINING),
    without=frozenset(SET_HERE | {"splits"}),
    defaults={"source": "shapes"},
    guide=GUIDE,
    recipe_settings=check_recipes,
    examples="""Writes OUT/data, OUT/runs/RECIPE and OUT/report. Settings override those of every recipe. --weights
are for resnet50v2 only.

examples:
  python jobs/pipeline.py --out demo
  python jobs/pipeline.py --source cifar10 --recipes deck_fan deck_resnet50v2 --workers 8 --out s3://bucket/deck
""",
)


def run(given: Given) -> None:
    from cifar_dist.launch.plan import ineffective_settings, make_plan  # noqa: PLC0415 - slow import, not needed for help

    pipeline, source, settings = (given.build(s) for s in (Pipeline, SourceSettings, EvaluationSettings))
    recipes = list(pipeline.recipes)
    if len(set(recipes)) < len(recipes):
        raise UserError(f"--recipes names one twice: {' '.join(recipes)}")
    out = output_uri(pipeline.out, "--out")
    data, storage, report = (join_uri(out, name) for name in ("data", "runs", "report"))
    launches = [given.build(Launch, recipe=r, data=data, storage=storage, name=r) for r in recipes]
    configs = [config_for(given, recipe) for recipe in recipes]
    if not source.overwrite:
        refuse_foreign(report, recipes, settings)
    prepare(source, data, launches[0].cluster, reuse=True)
    plans = [make_plan(*pair) for pair in zip(configs, launches, strict=True)]  # checks all runs before any trains
    if message := ineffective_settings(given.values, plans[0]):
        print(f"WARNING: {message}", flush=True)
    runs = [train_run(plan) for plan in plans]
    evaluate(runs, data, report, settings=settings, where=launches[0], overwrite=source.overwrite)
