"""Prepares a data set: a source -> Parquet, a manifest and a data card, checked image by image."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cifar_dist.cli.progress import Progress
from cifar_dist.command_line import Command, Given
from cifar_dist.cpus import num_cpus
from cifar_dist.errors import UserError
from cifar_dist.job_settings import ClusterAddress, SourceSettings
from cifar_dist.options import Section, option
from cifar_dist.uris import absolute_uri, join_uri, lies_in, output_uri

if TYPE_CHECKING:  # the modules that read images take a second to import
    from cifar_dist.data.manifest import Manifest
    from cifar_dist.data.parts import Made, Part
    from cifar_dist.data.sources import Source
    from cifar_dist.data.store import Passed


@dataclass(frozen=True, kw_only=True)
class Output(Section):
    table, heading = "output", "output"

    out: str = option(help="folder or URI of the data set to write", metavar="URI", common=True)


COMMAND = Command(
    description=str(__doc__),
    sections=(SourceSettings, Output, ClusterAddress),
    examples="""Runs on all CPUs of this machine, or with --address of a cluster. Killed, it goes on where it stopped.

examples:
  python jobs/prepare.py --source shapes --out /tmp/shapes
  python jobs/prepare.py --source cifar10 --out s3://bucket/cifar10
  python jobs/prepare.py --source folder --path ~/pictures.zip --out /data/pictures --skip-bad
  python jobs/prepare.py --source folder --path ~/pictures --labels labels.csv --out /data/pictures
""",
)


def run(given: Given) -> None:
    prepare(given.build(SourceSettings), given.build(Output).out, given.build(ClusterAddress).cluster)


def open_source(settings: SourceSettings) -> "Source":
    from cifar_dist.data import sources  # noqa: PLC0415 - slow import, not needed for help

    if settings.source == "shapes":
        return sources.shapes(settings.num_train, settings.num_test, settings.data_seed)
    if settings.source == "cifar10":
        return sources.cifar10(settings.path)
    return sources.find_source(
        settings.source,
        settings.path,
        labels=settings.labels,
        image_column=settings.image_column,
        label_column=settings.label_column,
        test_fraction=settings.test_fraction,
        seed=settings.data_seed,
    )


def prepare(settings: SourceSettings, out: str, cluster: str | None = None, *, reuse: bool = False) -> "Manifest":
    """Prepares the data set, on the Ray cluster at that address or on this machine alone.

    With `reuse`, a complete data set in `out` suffices if its source is gone."""
    from cifar_dist.data import sources, store  # noqa: PLC0415 - slow import, not needed for help
    from cifar_dist.data.sources.told import found_lines  # noqa: PLC0415

    refuse_overlap(settings, out)
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
    print("\n".join(found_lines(source, settings.path)), flush=True)
    with Progress(sum(map(len, source.splits.values()))) as progress:
        how = store.Preparation(
            rules=sources.Rules(check=settings.check, max_pixels=settings.max_pixels, alpha=settings.alpha),
            near_duplicates=settings.near_duplicates,
            skip_bad=settings.skip_bad,
            max_bad_share=settings.max_bad_share,
            overwrite=settings.overwrite,
            make_all=partial(make_all, cluster if source.reader.is_shared else None, settings.tasks),
            show=progress.show,
        )
        manifest, written = store.prepare(source, out, how)
    tell(manifest, out, written)
    return manifest


def refuse_overlap(settings: SourceSettings, out: str) -> None:
    """Raises UserError if the source lies in the data set's folder, or the reverse."""
    if settings.path:
        path = join_uri(absolute_uri(settings.path), "cifar-10-batches-py" if settings.source == "cifar10" else "")
        if lies_in(out, path) or lies_in(path, out):
            raise UserError(f"--out {out} and the source {path} lie in each other; name another folder for --out")


SMALL = 16 << 20, 2_000  # bytes and pictures below which starting processes costs more than they save


def make_all(cluster: str | None, num_tasks: int, parts: "list[Part]", uri: str, passed: "Passed") -> "Iterator[Made]":
    """Makes the parts in tasks on a cluster, in processes of this machine, or in this process if that is enough."""
    from cifar_dist.data.store import one_by_one  # noqa: PLC0415 - slow import, not needed for help

    sizes = sum(part.num_bytes for part in parts), sum(len(part.items) for part in parts)
    is_small = not num_tasks and sizes[0] < SMALL[0] and sizes[1] < SMALL[1]
    if cluster and not is_small:
        from cifar_dist.launch.preparation import on_cluster  # noqa: PLC0415 - imports Ray

        return on_cluster(parts, uri, passed, address=cluster, num_tasks=num_tasks)
    num_processes = 1 if is_small else min(num_tasks or num_cpus(), len(parts))
    if num_processes > 1:
        from cifar_dist.data.processes import in_processes  # noqa: PLC0415

        return in_processes(parts, uri, passed, num_processes=num_processes)
    return one_by_one(parts, uri, passed)


def tell(manifest: "Manifest", out: str, written: bool) -> None:
    """Prints what became of the source, from the data card and the list of what was left out."""
    from cifar_dist.data.card import read_card  # noqa: PLC0415 - slow import, not needed for help
    from cifar_dist.data.card_words import told  # noqa: PLC0415
    from cifar_dist.data.left_out import LEFT_OUT, reasons  # noqa: PLC0415
    from cifar_dist.data.manifest import SPLITS  # noqa: PLC0415

    bad = reasons(out) if manifest.num_skipped else []
    for reason in bad[:20]:
        print(f"skipped: {reason}", file=sys.stderr)
    if len(bad) > 20:
        print(f"skipped: {len(bad) - 20} more, see {join_uri(out, LEFT_OUT)}", file=sys.stderr)
    card = read_card(out, manifest)
    for line in told(card) if card else []:
        print(line, file=sys.stderr if line.startswith("WARNING") else sys.stdout)
    counts = ", ".join(f"{manifest.num_rows(s)} {s}" for s in SPLITS if s in manifest.splits)
    skipped = f", {manifest.num_skipped} bad images left out" if manifest.num_skipped else ""
    state = "prepared" if written else "already there and unchanged"
    print(f"{out}: {counts} images of {manifest.num_classes} classes{skipped}; {state}, sha256 {manifest.sha256[:16]}")


def is_gone(settings: SourceSettings, error: UserError) -> bool:
    """Whether a source cannot be opened because it no longer exists or, for cifar10, cannot be downloaded."""
    from cifar_dist.storage import is_empty  # noqa: PLC0415 - slow import, not needed for help

    if settings.source == "cifar10":  # no network
        return isinstance(error.__cause__, OSError | RuntimeError)
    return settings.source in ("folder", "parquet") and bool(settings.path) and is_empty(str(settings.path))
