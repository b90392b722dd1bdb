"""Evaluates runs in retriable Ray tasks, merges the shards and checks that each image has exactly one prediction."""

import functools
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tqdm import tqdm

from cifar_dist.config import Config
from cifar_dist.data.manifest import SPLITS, Manifest
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.evaluate.outputs import predictions_name
from cifar_dist.evaluate.scores import Counts
from cifar_dist.evaluate.shard import FLIPPED, Shard, check_checkpoint, evaluate_shard
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.folder import Run
from cifar_dist.run.splits import ids_of, stored_split
from cifar_dist.storage import Folder

OF_RUN = "run"  # the precision in which a run was trained


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of a run's best checkpoint: predictions in id order, and counts, by split.

    `precision`: in which it was computed, fp32, bf16 or fp16."""

    run: Run
    checkpoint: Checkpoint
    precision: str
    predictions: dict[str, pa.Table]
    counts: dict[str, Counts]


def choose(run_uris: list[str], data: DataSet) -> list[tuple[Run, Checkpoint]]:
    """Returns each run with its best checkpoint.

    Raises UserError for a run without a checkpoint or with another data set, and for runs of the same name.
    """
    runs = [Run(uri) for uri in run_uris]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the runs must differ in name, these do not: {', '.join(names)}")
    chosen = []
    for run in runs:
        best = run.best()
        if best is None:
            raise UserError(f"{run.uri} has no checkpoint to evaluate; train it first, or check the path")
        run.checkpoints.check_version(best)
        check_checkpoint(best, data.manifest, run)
        chosen.append((run, best))
    return chosen


def evaluate(
    chosen: list[tuple[Run, Checkpoint]],
    data: DataSet,
    out_uri: str,
    *,
    num_shards: int,
    splits: tuple[str, ...] = SPLITS,
    gpu: bool = False,
    flip_tta: bool = False,
    precision: str = OF_RUN,
) -> list[Evaluation]:
    """Evaluates each chosen run on the connected cluster and writes OUT/predictions/RUN-SPLIT.parquet.

    `precision`: fp32, or OF_RUN for each run's own. With `flip_tta` it also evaluates each split with flip test-time
    augmentation, as SPLIT+flip.

    Raises UserError unless each image has exactly one prediction.
    """
    if num_shards < 1:
        raise UserError(f"--shards must be 1 or more, not {num_shards}")
    task = task_of(evaluate_shard, gpu=gpu)

    used = {run.name: precision_of(best, precision, gpu=gpu) for run, best in chosen}

    def start(run: Run, best: Checkpoint) -> list[Any]:
        settings: dict[str, Any] = {"splits": splits, "num_shards": num_shards, "gpu": gpu, "flip_tta": flip_tta}
        settings["precision"] = used[run.name]
        shards = [Shard(run=run, checkpoint=best, data=data, index=i, **settings) for i in range(num_shards)]
        return [task.remote(shard) for shard in shards]

    tasks = [start(run, best) for run, best in chosen]
    labels = {stored: data.stage(stored).labels for stored in {stored_split(split, data.manifest) for split in splits}}
    folder = Folder(out_uri)
    folder.create("predictions")
    evaluations = []
    for (run, best), started in zip(chosen, tasks, strict=True):
        parts = results_of(started, run.name)
        merged = merge(parts, best, with_flipped(splits, flip_tta), labels, data.manifest)
        for split, (table, _) in merged.items():
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer)
            folder.write(predictions_name(run.name, split), buffer.getvalue().to_pybytes())
        tables, counts = {s: t for s, (t, _) in merged.items()}, {s: c for s, (_, c) in merged.items()}
        found: dict[str, Any] = {"precision": used[run.name], "predictions": tables, "counts": counts}
        evaluations.append(Evaluation(run=run, checkpoint=best, **found))
    return evaluations


def precision_of(checkpoint: Checkpoint, wanted: str, *, gpu: bool) -> str:
    """Returns the precision of an evaluation: the wanted one, or that of the checkpoint's training.

    CPUs have no instructions for fp16, so a run that was trained in it is evaluated in fp32 there."""
    trained = checkpoint.meta.get("precision", "fp32")
    if wanted != OF_RUN:
        return wanted
    return "fp32" if trained == "fp16" and not gpu else trained


def task_of(function: Callable[..., Any], *, gpu: bool) -> Any:
    """Returns the function as a Ray task, on a GPU in a fresh process each time.

    A process keeps the GPU that it used first, and memory there. Ray ends it only if `num_gpus` is given here, not in
    `options`.
    """
    return ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=3)(function)


def with_flipped(splits: tuple[str, ...], flip_tta: bool) -> tuple[str, ...]:
    """Returns the names of the scored splits: with flip test-time augmentation also SPLIT+flip for each split."""
    return tuple(name for split in splits for name in (split, split + FLIPPED)) if flip_tta else splits


def results_of(tasks: list[Any], name: str) -> list[dict[str, tuple[pa.Table, Counts]]]:
    try:
        results, terminal = [], sys.stderr.isatty()
        for task in tqdm(tasks, f"evaluate {name}", unit=" shards", disable=not terminal):
            results.append(ray.get(task))
            if not terminal:
                print(f"evaluate {name}: {len(results)} of {len(tasks)} shards done", flush=True)
        return results
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from error
        raise
    except ray.exceptions.RayError as error:
        raise UserError(f"an evaluation shard was lost more than 3 times: {str(error).splitlines()[0]}") from error


def merge(
    parts: list[dict[str, tuple[pa.Table, Counts]]],
    checkpoint: Checkpoint,
    splits: tuple[str, ...],
    labels: dict[str, np.ndarray],
    manifest: Manifest,
) -> dict[str, tuple[pa.Table, Counts]]:
    """Returns the shards' merged tables, in id order, and the sum of their counts, by split.

    Raises UserError unless each id of a split occurs exactly once."""
    config, merged = Config.from_dict(checkpoint.meta["config"]), {}
    for split in splits:
        table = pa.concat_tables([part[split][0] for part in parts]).sort_by("id")
        counts = functools.reduce(operator.add, [part[split][1] for part in parts])
        plain = split.removesuffix(FLIPPED)
        expected = ids_of(plain, config, manifest, labels[stored_split(plain, manifest)])
        if not np.array_equal(table["id"].to_numpy(), expected) or counts.num_images != len(expected):
            raise UserError(
                f"{split}: {len(table)} predictions came back for {len(expected)} images of data set "
                f"{manifest.sha256[:16]}, not exactly one each; evaluate again"
            )
        merged[split] = table, counts
    return merged
