"""Evaluates runs: every image of each split exactly once through each run's best checkpoint, then the report."""

from cifar_dist.stopping import listen

listen(__name__ == "__main__")  # before the imports below, which take seconds

import argparse
import sys
import uuid

from train import add_cluster_options  # first: it sets the environment that Ray reads when it is imported

from cifar_dist.config import Parser
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.evaluate import driver, outputs, report
from cifar_dist.evaluate.shard import SPLITS
from cifar_dist.launch import cluster
from cifar_dist.uris import output_uri

EXAMPLE = """example:
  python jobs/evaluate.py --runs /tmp/runs/first --data /tmp/shapes --out /tmp/report --shards 2
"""


def add_tta_option(p: Parser) -> None:
    p.add_argument("--flip-tta", action="store_true", help="also score with flipped images, reported as SPLIT+flip")


def parser() -> Parser:
    p = Parser(prog="evaluate.py", description=__doc__, epilog=EXAMPLE)
    p.add_argument("--runs", required=True, nargs="+", metavar="URI", help="run folders (STORAGE/NAME)")
    p.add_argument("--data", required=True, metavar="URI", help="the data set that the runs were trained on")
    p.add_argument("--out", required=True, metavar="URI", help="folder for predictions, report.json and report.html")
    p.add_argument(
        "--shards", type=int, default=0, metavar="N", help="parallel tasks (default: the cluster's CPUs or GPUs)"
    )
    p.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="splits to evaluate (default: all)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files of these names that no evaluation wrote")
    add_tta_option(p)
    add_cluster_options(p)
    return p


def check_shards(args: argparse.Namespace) -> None:
    if args.shards < 0:
        raise UserError(f"--shards must be 1 or more, not {args.shards}")


def refuse_foreign(args: argparse.Namespace, out: str, runs: list[str], splits: list[str]) -> None:
    """Raises UserError, without --overwrite, if a file that no evaluation wrote would be replaced."""
    if not args.overwrite:
        scored = driver.with_flipped(tuple(splits), args.flip_tta)
        outputs.refuse_foreign(out, [outputs.predictions_name(run, split) for run in runs for split in scored])


def evaluate(args: argparse.Namespace, runs: list[str], data: str, out: str, splits: list[str]) -> str:
    check_shards(args)
    out = output_uri(out, "--out")
    chosen = driver.choose(runs, data)  # before a cluster is started
    refuse_foreign(args, out, list(chosen), splits)
    cluster.connect(args.address, 1)
    gpu = cluster.uses_gpu(args.device)
    num_shards = args.shards or cluster.count_resource("GPU" if gpu else "CPU")
    if not cluster.count_resource("CPU"):
        raise UserError("the cluster has no CPUs to evaluate on; wait for its workers, or check --address")
    where, job = args.staging_folder, uuid.uuid4().hex
    evaluations = driver.evaluate(chosen, data, out, num_shards, tuple(splits), gpu, where, args.flip_tta, job)
    page = report.write_report(evaluations, data, out, where, job)
    for evaluation in evaluations:
        for split, counts in evaluation.counts.items():
            correct, n = int(counts.confusion.trace()), counts.num_images
            print(f"{evaluation.name} {split}: {correct}/{n} correct, accuracy {correct / n:.2%}")
    print(f"report: {page}")
    return page


if __name__ == "__main__":
    options = parser().parse_args()
    run = lambda: evaluate(options, options.runs, options.data, options.out, options.splits)  # noqa: E731
    sys.exit(exit_code_of(run, options.debug))
