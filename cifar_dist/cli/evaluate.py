"""Evaluates runs: every image of each split exactly once through each run's best checkpoint, then the report."""

import uuid
from dataclasses import dataclass

from cifar_dist.command_line import Command, Given
from cifar_dist.errors import UserError
from cifar_dist.job_settings import ClusterSettings, EvaluationSettings
from cifar_dist.options import Section, option
from cifar_dist.uris import output_uri


@dataclass(frozen=True, kw_only=True)
class Inputs(Section):
    table, heading = "inputs", "what is evaluated"

    runs: tuple[str, ...] = option(help="run folders (STORAGE/NAME)", metavar="URI", common=True)
    data: str = option(help="the data set that the runs were trained on", metavar="URI", common=True)
    out: str = option(help="folder for predictions, report.json and report.html", metavar="URI", common=True)
    overwrite: bool = option(False, help="replace files of these names that no evaluation wrote")
    precision: str = option(
        "run",
        help="run: that of each run's training, but on CPUs fp32 for fp16; fp32: for exact comparisons",
        choices=("run", "fp32"),
    )


COMMAND = Command(
    description=str(__doc__),
    sections=(Inputs, EvaluationSettings, ClusterSettings),
    examples="""example:
  python jobs/evaluate.py --runs /tmp/runs/first --data /tmp/shapes --out /tmp/report --shards 2
""",
)


def run(given: Given) -> None:
    inputs = given.build(Inputs)
    evaluate(
        list(inputs.runs),
        inputs.data,
        inputs.out,
        settings=given.build(EvaluationSettings),
        where=given.build(ClusterSettings),
        overwrite=inputs.overwrite,
        precision=inputs.precision,
    )


def refuse_foreign(out: str, runs: list[str], settings: EvaluationSettings) -> None:
    """Raises UserError if a file that no evaluation wrote would be replaced."""
    from cifar_dist.evaluate import driver, outputs  # noqa: PLC0415 - slow import, not needed for help

    scored = driver.with_flipped(settings.splits, settings.flip_tta)
    outputs.refuse_foreign(out, [outputs.predictions_name(run, split) for run in runs for split in scored])


def evaluate(
    runs: list[str],
    data_uri: str,
    out: str,
    *,
    settings: EvaluationSettings,
    where: ClusterSettings,
    overwrite: bool = False,
    precision: str = "run",
) -> str:
    """Evaluates the runs and writes the report. Returns the URI of the report's page."""
    from cifar_dist.data.card import read_card  # noqa: PLC0415 - slow import, not needed for help
    from cifar_dist.data.private import Staging  # noqa: PLC0415
    from cifar_dist.data.staged import DataSet  # noqa: PLC0415
    from cifar_dist.evaluate import driver, report  # noqa: PLC0415
    from cifar_dist.launch import cluster  # noqa: PLC0415

    out = output_uri(out, "--out")
    data = DataSet.open(data_uri, Staging(job=uuid.uuid4().hex, folder=where.staging_folder))
    data_card = read_card(data.uri, data.manifest)  # reports faults, like the next line, before a cluster is started
    chosen = driver.choose(runs, data)
    if not overwrite:
        refuse_foreign(out, [run.name for run, _ in chosen], settings)
    cluster.connect(where.cluster, 1)
    gpu = cluster.uses_gpu(where.device)
    num_shards = settings.shards or cluster.count_resource("GPU" if gpu else "CPU")
    if not cluster.count_resource("CPU"):
        raise UserError("the cluster has no CPUs to evaluate on; wait for its workers, or check --address")
    evaluations = driver.evaluate(
        chosen,
        data,
        out,
        num_shards=num_shards,
        splits=settings.splits,
        gpu=gpu,
        flip_tta=settings.flip_tta,
        precision=precision,
    )
    page = report.write_report(evaluations, data, out, data_card)
    for evaluation in evaluations:
        for split, counts in evaluation.counts.items():
            correct, n = int(counts.confusion.trace()), counts.num_images
            print(f"{evaluation.run.name} {split}: {correct}/{n} correct, accuracy {correct / n:.2%}")
    print(f"report: {page}")
    return page
