"""Prepares a data set: a source -> Parquet and a manifest, checked image by image."""

from cifar_dist.stopping import listen

listen(__name__ == "__main__")  # before the imports below, which take seconds

import argparse
import sys
from collections.abc import Iterable

from tqdm import tqdm

from cifar_dist.config import Parser
from cifar_dist.data import sources, store
from cifar_dist.data.manifest import Manifest
from cifar_dist.errors import UserError, exit_code_of
from cifar_dist.storage import is_empty
from cifar_dist.uris import absolute_uri, join_uri, lies_in, output_uri

EXAMPLES = """examples:
  python jobs/prepare.py --source shapes --out /tmp/shapes
  python jobs/prepare.py --source cifar10 --out s3://bucket/cifar10
  python jobs/prepare.py --source folder --path ~/pictures --out /data/pictures --skip-bad
"""


def add_source_options(p: Parser, default: str | None = None) -> None:
    choices = ("cifar10", "folder", "parquet", "shapes")
    what = "what to read" + (f" (default {default})" if default else "")
    p.add_argument("--source", required=not default, default=default, choices=choices, help=what)
    p.add_argument("--path", help="where the source is (cifar10: where its download is kept)")
    p.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and count them")
    p.add_argument("--overwrite", action="store_true", help="replace what is already there")
    p.add_argument("--test-fraction", type=float, default=0.2, help="test share drawn where there is no test split")
    p.add_argument("--data-seed", type=int, default=0, help="seed of that draw and of the shapes")
    p.add_argument("--num-train", type=int, default=1000, help="shapes: images to draw for train")
    p.add_argument("--num-test", type=int, default=500, help="shapes: images to draw for test")


def parser() -> Parser:
    p = Parser(prog="prepare.py", description=__doc__, epilog=EXAMPLES)
    add_source_options(p)
    p.add_argument("--out", required=True, metavar="URI", help="folder or URI of the data set to write")
    return p


def check_options(args: argparse.Namespace) -> None:
    if not 0 < args.test_fraction < 1:
        raise UserError(f"--test-fraction must lie between 0 and 1, not {args.test_fraction}")
    if args.data_seed < 0:
        raise UserError(f"--data-seed must be 0 or more, not {args.data_seed}")
    if args.source == "shapes" and args.path:
        raise UserError("--source shapes draws its images and reads no --path")


def open_source(args: argparse.Namespace) -> sources.Source:
    if args.source == "shapes":
        return sources.shapes(args.num_train, args.num_test, args.data_seed)
    if args.source == "cifar10":
        return sources.cifar10(args.path)
    reader = sources.image_folder if args.source == "folder" else sources.parquet
    return reader(args.path, args.test_fraction, args.data_seed)


def prepare(args: argparse.Namespace, out: str, go_on: bool = False) -> Manifest:
    """Prepares the data set; with `go_on` a whole one that is there is enough where its source is gone."""
    check_options(args)
    if args.path:
        path = join_uri(absolute_uri(args.path), "cifar-10-batches-py" if args.source == "cifar10" else "")
        if lies_in(out, path) or lies_in(path, out):
            raise UserError(f"--out {out} and the source {path} lie in each other; name another folder for --out")
    out = output_uri(out, "--out")
    try:
        source = open_source(args)
    except UserError as error:
        no_network = args.source == "cifar10" and isinstance(error.__cause__, OSError | RuntimeError)
        is_gone = no_network or (args.source in ("folder", "parquet") and args.path and is_empty(args.path))
        if not go_on or args.overwrite or not is_gone or (whole := store.whole(out, args.source)) is None:
            raise
        print(f"WARNING: {error}. Going on with the whole data set that is in {out}", file=sys.stderr)
        return whole

    def progress(rows: Iterable[sources.Row], split: str, total: int) -> Iterable[sources.Row]:
        return tqdm(rows, f"prepare {split}", total, unit=" images", disable=not sys.stderr.isatty())

    manifest, written = store.prepare(source, out, args.skip_bad, args.overwrite, progress)
    for message in source.skipped:
        print(f"skipped: {message}", file=sys.stderr)
    if warning := source.deep.warning():
        print(f"WARNING: {warning}", file=sys.stderr)
    counts = ", ".join(f"{manifest.num_rows(s)} {s}" for s in manifest.splits)
    skipped = f", {manifest.num_skipped} bad images left out" if manifest.num_skipped else ""
    state = "prepared" if written else "already there and unchanged"
    print(f"{out}: {counts} images of {manifest.num_classes} classes{skipped}; {state}, sha256 {manifest.sha256[:16]}")
    return manifest


if __name__ == "__main__":
    options = parser().parse_args()
    sys.exit(exit_code_of(lambda: prepare(options, options.out), options.debug))
