"""Trains one model: a data set and a recipe -> a run with checkpoints. The same --name again continues the run."""

from cifar_dist.stopping import listen

listen(__name__ == "__main__")  # before the imports below, which take seconds

import argparse
import sys

from cifar_dist.config import Config, Parser, add_cluster_options, add_config_options, config_overrides, worker_range
from cifar_dist.environment import prepare_environment
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.recipes import describe_recipes, recipe_config
from cifar_dist.train.job import StartUp
from cifar_dist.uris import output_uri

START_UP = StartUp()
prepare_environment()

from cifar_dist.config import Launch
from cifar_dist.launch import cluster, driver, plan, preflight
from cifar_dist.train.job import Plan

EPILOG = f"""recipes:
{describe_recipes()}

example:
  python jobs/train.py --recipe quickstart_fan --data /tmp/shapes --storage /tmp/runs --name first --workers 2
"""


def add_launch_options(p: Parser) -> None:
    elastic = "data-parallel workers (default 1); MIN:MAX goes on with what the cluster has and grows again"
    p.add_argument("--workers", type=worker_range, default=(1, None), metavar="N|MIN:MAX", help=elastic)
    p.add_argument("--max-failures", type=int, default=3, help="worker failures survived before giving up (default 3)")
    p.add_argument("--collective-timeout-seconds", type=int, default=120, help="limit of a hung worker (default 120)")
    look = "MIN:MAX: how often more workers are looked for (default 60)"
    p.add_argument("--resize-seconds", type=float, default=60.0, help=look)
    p.add_argument("--profile", action="store_true", help="store torch.profiler's trace of five steps in the run")
    add_cluster_options(p)


def parser() -> Parser:
    p = Parser(prog="train.py", description=__doc__, epilog=EPILOG)
    p.add_argument("--recipe", required=True, metavar="NAME", help="named settings; the options below override them")
    p.add_argument("--data", required=True, metavar="URI", help="the prepared data set")
    p.add_argument("--storage", required=True, metavar="URI", help="shared folder of all runs")
    p.add_argument("--name", required=True, metavar="RUN", help="the run, a folder under --storage")
    p.add_argument("--preflight-only", action="store_true", help="check cluster, storage and data, print a table, stop")
    p.add_argument("--explain-resume", action="store_true", help="print what would be loaded and why, run nothing")
    add_launch_options(p)
    add_config_options(p)
    return p


def settings(args: argparse.Namespace, recipe: str, data: str, storage: str, name: str) -> tuple[Config, Launch]:
    """The run's configuration and launch, checked."""
    (num_workers, min_workers), limits = args.workers, (args.max_failures, args.collective_timeout_seconds)
    where = args.device, *limits, args.resize_seconds, args.staging_folder, args.address, args.profile
    launched = Launch(data, storage, name, num_workers, min_workers, recipe, *where)
    return recipe_config(recipe, **config_overrides(args)), launched


def train(planned: Plan, start_up: StartUp | None = None) -> str:
    """The URI of the trained run."""
    start_up = start_up or StartUp()
    if not planned.is_finished:
        cluster.connect(planned.launch.address, planned.launch.num_workers)

    start_up.end("cluster and imports")
    result = driver.train(planned, start_up)
    best, state = result.best, "is finished already" if result.was_finished else "finished"
    accuracy = (best.meta["metrics"] or {}).get("validation_accuracy")
    found = "not known: no validation had a finite result" if accuracy is None else f"{accuracy:.2%} (validation)"
    print(f"run {planned.launch.name} {state}: best {best.name}, accuracy {found}")
    print(f"run folder: {result.run_uri}")
    return result.run_uri


def main(args: argparse.Namespace) -> None:
    storage = output_uri(args.storage, "--storage")
    planned = plan.make_plan(*settings(args, args.recipe, args.data, storage, args.name))
    START_UP.end("plan and its imports")
    if args.explain_resume:
        print(plan.explain_resume(planned))
    elif args.preflight_only:
        _, findings = cluster.check_cluster(planned)
        print(preflight.table(findings))
        if any(finding.status == "failed" for finding in findings):
            raise UserError("preflight failed, see the table")
    else:
        train(planned, START_UP)


if __name__ == "__main__":
    options = parser().parse_args()
    sys.exit(exit_code_of(lambda: main(options), options.debug))
