"""The main job: prepare a data set, train both models, evaluate, report. Run again, it goes on where it stopped."""

from cifar_dist.stopping import listen

listen(__name__ == "__main__")  # before the imports below, which take seconds

import argparse
import sys

from evaluate import add_tta_option, check_shards, evaluate, refuse_foreign
from prepare import add_source_options, prepare
from train import add_launch_options, settings, train

from cifar_dist.config import Parser, add_config_options
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.launch.plan import make_plan
from cifar_dist.recipes import describe_recipes
from cifar_dist.uris import join_uri, output_uri

EPILOG = f"""recipes:
{describe_recipes()}

Writes OUT/data, OUT/runs/RECIPE and OUT/report. Settings given here override those of every recipe, but --weights
those of resnet50v2 only.

examples:
  python jobs/pipeline.py --out demo
  python jobs/pipeline.py --source cifar10 --recipes deck_fan deck_resnet50v2 --workers 8 --out s3://bucket/deck
"""


def parser() -> Parser:
    p = Parser(prog="pipeline.py", description=__doc__, epilog=EPILOG)
    p.add_argument("--out", required=True, metavar="URI", help="shared folder for data, runs and report")
    recipes = ["quickstart_fan", "quickstart_resnet50v2"]
    p.add_argument("--recipes", nargs="+", metavar="NAME", default=recipes, help=f"default: {' '.join(recipes)}")
    p.add_argument("--shards", type=int, default=0, metavar="N", help="evaluation tasks (default: CPUs or GPUs)")
    add_tta_option(p)
    add_source_options(p, default="shapes")
    add_launch_options(p)
    add_config_options(p)
    return p


def pipeline(args: argparse.Namespace) -> None:
    check_shards(args)
    if len(set(args.recipes)) < len(args.recipes):
        raise UserError(f"--recipes names one twice: {' '.join(args.recipes)}")
    out = output_uri(args.out, "--out")
    data, storage, report = (join_uri(out, name) for name in ("data", "runs", "report"))
    planned = [settings(args, recipe, data, storage, name=recipe) for recipe in args.recipes]
    # One file of weights cannot fit both networks.
    planned = [(c.replace(weights=c.model.weights if c.model.model == "resnet50v2" else ""), w) for c, w in planned]
    splits = ["train", "validation", "test"]
    refuse_foreign(args, report, args.recipes, splits)
    prepare(args, data, go_on=True)
    plans = [make_plan(*run) for run in planned]  # all are checked before the first one trains
    runs = [train(plan) for plan in plans]
    evaluate(args, runs, data, report, splits)


if __name__ == "__main__":
    options = parser().parse_args()
    sys.exit(exit_code_of(lambda: pipeline(options), options.debug))
