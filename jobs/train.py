"""Trains one model: a data set and a recipe -> a run with checkpoints. The same --name again continues the run."""

import argparse
import os
import sys

from cifar_dist.config import Config, Parser, add_config_options, config_overrides, prepare_environment
from cifar_dist.errors import exit_code_of
from cifar_dist.recipes import describe_recipes, recipe_config

RAY_ADDRESS = prepare_environment()

from cifar_dist.train import launch  # noqa: E402 - Ray reads the environment when it is imported

EPILOG = f"""recipes:
{describe_recipes()}

example:
  python jobs/train.py --recipe quickstart_fan --data /tmp/shapes --storage /tmp/runs --name first --workers 2
"""


def add_cluster_options(p: Parser) -> None:
    where, cluster = "local folder for staged data", "Ray cluster (default: RAY_ADDRESS, else one is started here)"
    p.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: GPUs if the cluster has any")
    p.add_argument("--staging-folder", type=os.path.abspath, help=f"{where} (default: in the temporary folder)")
    p.add_argument("--address", default=RAY_ADDRESS, help=cluster)


def add_launch_options(p: Parser) -> None:
    p.add_argument("--workers", type=int, default=1, metavar="N", help="data-parallel workers (default 1)")
    p.add_argument("--max-failures", type=int, default=3, help="worker failures survived before giving up (default 3)")
    p.add_argument("--collective-timeout-seconds", type=int, default=300, help="a worker that hangs longer has failed")
    add_cluster_options(p)


def parser() -> Parser:
    p = Parser(prog="train.py", description=__doc__, epilog=EPILOG)
    p.add_argument("--recipe", required=True, metavar="NAME", help="named settings; the options below override them")
    p.add_argument("--data", required=True, metavar="URI", help="the prepared data set")
    p.add_argument("--storage", required=True, metavar="URI", help="shared folder of all runs")
    p.add_argument("--name", required=True, metavar="RUN", help="the run, a folder under --storage")
    add_launch_options(p)
    add_config_options(p)
    return p


def settings(args: argparse.Namespace, recipe: str, data: str, storage: str, name: str) -> tuple[Config, launch.Launch]:
    """The run's configuration and launch, checked."""
    config = recipe_config(recipe, **config_overrides(args))
    limits = args.max_failures, args.collective_timeout_seconds
    where = args.staging_folder, args.address
    return config, launch.Launch(data, storage, name, args.workers, recipe, args.device, *limits, *where)


def train(config: Config, where: launch.Launch) -> launch.RunResult:
    result = launch.train(config, where)
    metrics, state = result.best.meta["metrics"], "is finished already" if result.was_finished else "finished"
    print(
        f"run {where.name} {state}: best {result.best.name}, accuracy {metrics['validation_accuracy']:.2%} (validation)"
    )
    print(f"run folder: {result.run_uri}")
    return result


if __name__ == "__main__":
    options = parser().parse_args()
    run = lambda: train(*settings(options, options.recipe, options.data, options.storage, options.name))  # noqa: E731
    sys.exit(exit_code_of(run, options.debug))
