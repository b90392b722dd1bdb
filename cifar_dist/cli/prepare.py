"""Prepares a data set: a source -> Parquet and a manifest, checked image by image."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cifar_dist.command_line import Command, Given
from cifar_dist.errors import UserError
from cifar_dist.job_settings import SourceSettings
from cifar_dist.options import Section, option
from cifar_dist.uris import absolute_uri, join_uri, lies_in, output_uri

if TYPE_CHECKING:  # the modules that read images take a second to import
    from cifar_dist.data.manifest import Manifest
    from cifar_dist.data.sources import Row, Source


@dataclass(frozen=True, kw_only=True)
class Output(Section):
    table, heading = "output", "output"

    out: str = option(help="folder or URI of the data set to write", metavar="URI", common=True)


COMMAND = Command(
    description=str(__doc__),
    sections=(SourceSettings, Output),
    examples="""examples:
  python jobs/prepare.py --source shapes --out /tmp/shapes
  python jobs/prepare.py --source cifar10 --out s3://bucket/cifar10
  python jobs/prepare.py --source folder --path ~/pictures --out /data/pictures --skip-bad
""",
)


def run(given: Given) -> None:
    prepare(given.build(SourceSettings), given.build(Output).out)


def open_source(settings: SourceSettings) -> "Source":
    from cifar_dist.data import sources  # noqa: PLC0415 - slow import, not needed for help

    if settings.source == "shapes":
        return sources.shapes(settings.num_train, settings.num_test, settings.data_seed)
    if settings.source == "cifar10":
        return sources.cifar10(settings.path)
    reader = sources.image_folder if settings.source == "folder" else sources.parquet
    return reader(settings.path, settings.test_fraction, settings.data_seed)


def prepare(settings: SourceSettings, out: str, *, reuse: bool = False) -> "Manifest":
    """Prepares the data set. With `reuse`, a complete data set in `out` suffices if its source is gone."""
    from cifar_dist.data import store  # noqa: PLC0415 - slow import, not needed for help

    if settings.path:
        path = join_uri(absolute_uri(settings.path), "cifar-10-batches-py" if settings.source == "cifar10" else "")
        if lies_in(out, path) or lies_in(path, out):
            raise UserError(f"--out {out} and the source {path} lie in each other; name another folder for --out")
    out = output_uri(out, "--out")
    try:
        source = open_source(settings)
    except UserError as error:
        if not reuse or settings.overwrite or not is_gone(settings, error):
            raise
        if (whole := store.whole(out, settings.source)) is None:
            raise
        print(f"WARNING: {error}. Going on with the whole data set that is in {out}", file=sys.stderr)
        return whole
    manifest, written = store.prepare(source, out, settings.skip_bad, settings.overwrite, show_progress)
    for message in source.skipped:
        print(f"skipped: {message}", file=sys.stderr)
    if warning := source.deep.warning():
        print(f"WARNING: {warning}", file=sys.stderr)
    counts = ", ".join(f"{manifest.num_rows(s)} {s}" for s in manifest.splits)
    skipped = f", {manifest.num_skipped} bad images left out" if manifest.num_skipped else ""
    state = "prepared" if written else "already there and unchanged"
    print(f"{out}: {counts} images of {manifest.num_classes} classes{skipped}; {state}, sha256 {manifest.sha256[:16]}")
    return manifest


def is_gone(settings: SourceSettings, error: UserError) -> bool:
    """Whether a source cannot be opened because it no longer exists or, for cifar10, cannot be downloaded."""
    from cifar_dist.storage import is_empty  # noqa: PLC0415 - slow import, not needed for help

    if settings.source == "cifar10":  # no network
        return isinstance(error.__cause__, OSError | RuntimeError)
    return settings.source in ("folder", "parquet") and bool(settings.path) and is_empty(str(settings.path))


def show_progress(rows: Iterable["Row"], split: str, total: int) -> Iterable["Row"]:
    from tqdm import tqdm  # noqa: PLC0415 - slow import, not needed for help

    return tqdm(rows, f"prepare {split}", total, unit=" images", disable=not sys.stderr.isatty())
