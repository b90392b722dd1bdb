"""Trains one model: a data set and a recipe -> a run with checkpoints. The same --name again continues the run."""

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar_dist.command_line import Command, Given
from cifar_dist.config import CheckpointConfig, Config, DataConfig, LoopConfig, ModelConfig, OptimConfig, option_fields
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.options import Section, option
from cifar_dist.recipes import RECIPES, describe_recipes, recipe_config
from cifar_dist.uris import output_uri

if TYPE_CHECKING:  # the imports of a plan take a second
    from cifar_dist.train.job import Plan, StartUp

TRAINING = ModelConfig, DataConfig, OptimConfig, LoopConfig, CheckpointConfig
GUIDE = f"recipes:\n{describe_recipes()}\n"


@dataclass(frozen=True, kw_only=True)
class Checks(Section):
    table, heading = "checks", "checks"

    preflight_only: bool = option(False, help="check cluster, storage and data, print a table, train nothing")
    explain_resume: bool = option(False, help="print which checkpoint would be loaded and why, train nothing")


def config_of(given: Given, recipe: str) -> Config:
    """Returns the recipe's settings, overridden by the user's."""
    return recipe_config(recipe, **{name: v for name, v in given.values.items() if name in option_fields()})


def recipe_settings(given: Given) -> dict[str, Any]:
    """Returns the recipe's settings by name. Raises UserError without a recipe."""
    if "recipe" not in given.values:
        raise UserError(
            f"--print-config needs a --recipe, which sets what is not given; there are {', '.join(RECIPES)}"
        )
    return config_of(given, given.values["recipe"]).values()


COMMAND = Command(
    description=str(__doc__),
    sections=(Launch, Checks, *TRAINING),
    recipe_settings=recipe_settings,
    guide=GUIDE,
    examples="""example:
  python jobs/train.py --recipe quickstart_fan --data /tmp/shapes --storage /tmp/runs --name first --workers 2
""",
)


def run(given: Given) -> None:
    started_at, checks, launch = time.time(), given.build(Checks), given.build(Launch)
    config = config_of(given, launch.recipe)
    from cifar_dist.launch.plan import explain_resume, ineffective_settings, make_plan  # noqa: PLC0415 - a mistake is answered at once
    from cifar_dist.train.job import StartUp  # noqa: PLC0415

    start_up = StartUp(started_at)
    storage = output_uri(launch.storage, "--storage")
    plan = make_plan(config, dataclasses.replace(launch, storage=storage))
    start_up.end("plan and its imports")
    if message := ineffective_settings(given.values, plan):
        print(f"WARNING: {message}", flush=True)
    if checks.explain_resume:
        print(explain_resume(plan))
    elif checks.preflight_only:
        show_preflight(plan)
    else:
        train_run(plan, start_up)


def show_preflight(plan: "Plan") -> None:
    from cifar_dist.launch import cluster, preflight  # noqa: PLC0415 - slow import, not needed for help

    _, findings = cluster.check_cluster(plan)
    print(preflight.table(findings))
    if any(finding.status == "failed" for finding in findings):
        raise UserError("preflight failed, see the table")


def train_run(plan: "Plan", start_up: "StartUp | None" = None) -> str:
    """Trains and prints the result. Returns the run's URI."""
    from cifar_dist.launch import cluster  # noqa: PLC0415 - slow import, not needed for help
    from cifar_dist.train.job import StartUp  # noqa: PLC0415

    start_up = start_up or StartUp()
    if not plan.is_finished:
        cluster.connect(plan.launch.cluster, plan.launch.num_workers)
    from cifar_dist.launch import driver  # noqa: PLC0415 - slow import; the errors above come first

    start_up.end("cluster and imports")
    result = driver.drive(plan, start_up)
    best, state = result.best, "is finished already" if result.was_finished else "finished"
    accuracy = (best.meta["metrics"] or {}).get("validation_accuracy")
    found = "not known: no validation had a finite result" if accuracy is None else f"{accuracy:.2%} (validation)"
    print(f"run {result.run.name} {state}: best {best.name}, accuracy {found}")
    print(f"run folder: {result.run.uri}")
    return result.run.uri
