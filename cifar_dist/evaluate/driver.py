"""Evaluates runs in retriable Ray tasks, merges the shards and checks that every image came exactly once."""

import functools
import operator
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tqdm import tqdm

from cifar_dist.config import Config
from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.staged import Staging, stage
from cifar_dist.errors import UserError
from cifar_dist.evaluate.outputs import predictions_name
from cifar_dist.evaluate.scores import Counts
from cifar_dist.evaluate.shard import FLIPPED, SPLITS, Shard, check_checkpoint, evaluate_shard, ids_of, stored_split
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri


@dataclass(frozen=True)
class Evaluation:
    """One run's best checkpoint over the splits: predictions in id order, and counts."""

    name: str
    run_uri: str
    checkpoint: Checkpoint
    predictions: dict[str, pa.Table]
    counts: dict[str, Counts]


def run_name(run_uri: str) -> str:
    return run_uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def choose(run_uris: list[str], data_uri: str) -> dict[str, tuple[str, Checkpoint]]:
    """Name -> (URI, best checkpoint) of each run.

    Raises UserError for a run without a checkpoint or one of another data set, and for runs of the same name.
    """
    run_uris = [absolute_uri(uri) for uri in run_uris]
    names = [run_name(uri) for uri in run_uris]
    if len(set(names)) < len(names):
        raise UserError(f"the runs must differ in name, these do not: {', '.join(names)}")
    manifest = read_manifest(absolute_uri(data_uri))
    chosen = {}
    for name, uri in zip(names, run_uris, strict=True):
        checkpoints = Checkpoints(uri)
        best = checkpoints.best()
        if best is None:
            raise UserError(f"{uri} has no checkpoint to evaluate; train it first, or check the path")
        checkpoints.check_version(best)
        check_checkpoint(best, manifest, uri)
        chosen[name] = uri, best
    return chosen


def evaluate(
    chosen: dict[str, tuple[str, Checkpoint]],
    data_uri: str,
    out_uri: str,
    num_shards: int,
    splits: tuple[str, ...] = SPLITS,
    gpu: bool = False,
    staging_folder: str | None = None,
    flip_tta: bool = False,
    job: str = "",
) -> list[Evaluation]:
    """Evaluates each chosen run on the connected cluster and writes OUT/predictions/RUN-SPLIT.parquet.

    Processes with the same `job` check a staged file once. With `flip_tta` each split comes a second time, as
    SPLIT+flip, with flip test-time augmentation.

    Raises UserError for predictions that are not exactly one per image.
    """
    if num_shards < 1:
        raise UserError(f"--shards must be 1 or more, not {num_shards}")
    data_uri = absolute_uri(data_uri)
    manifest = read_manifest(data_uri)
    task = ray.remote(evaluate_shard).options(num_cpus=1, num_gpus=int(gpu), max_retries=3)
    options: dict[str, Any] = {"gpu": gpu, "staging_folder": staging_folder, "flip_tta": flip_tta, "job": job}
    shards = {
        name: [task.remote(Shard(uri, best, data_uri, splits, i, num_shards, **options)) for i in range(num_shards)]
        for name, (uri, best) in chosen.items()
    }
    labels = {
        stored: stage(data_uri, stored, staging_folder, manifest, Staging(job)).labels
        for stored in {stored_split(split) for split in splits}
    }
    splits = with_flipped(splits, flip_tta)
    folder = Folder(out_uri)
    folder.create("predictions")
    evaluations = []
    for name, (uri, best) in chosen.items():
        merged = merge(results_of(shards[name], name), best, splits, labels, manifest)
        for split, (table, _) in merged.items():
            buffer = pa.BufferOutputStream()
            pq.write_table(table, buffer)
            folder.write(predictions_name(name, split), buffer.getvalue().to_pybytes())
        tables, counts = {s: t for s, (t, _) in merged.items()}, {s: c for s, (_, c) in merged.items()}
        evaluations.append(Evaluation(name, uri, best, tables, counts))
    return evaluations


def with_flipped(splits: tuple[str, ...], flip_tta: bool) -> tuple[str, ...]:
    """The splits that are scored: with flip test-time augmentation each comes a second time."""
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
    """The shards' tables in id order and the sum of their counts; every id of the split must be there exactly once."""
    config, merged = Config.from_dict(checkpoint.meta["config"]), {}
    for split in splits:
        table = pa.concat_tables([part[split][0] for part in parts]).sort_by("id")
        counts = functools.reduce(operator.add, [part[split][1] for part in parts])
        expected = ids_of(split, config, labels[stored_split(split)])
        if not np.array_equal(table["id"].to_numpy(), expected) or counts.num_images != len(expected):
            raise UserError(
                f"{split}: {len(table)} predictions came back for {len(expected)} images of data set "
                f"{manifest.sha256[:16]}, not exactly one each; evaluate again"
            )
        merged[split] = table, counts
    return merged
