"""Declares the settings of jobs that do not affect what is learned: launch, cluster, source, evaluation."""

import os
import re
from dataclasses import dataclass
from typing import Any

from cifar_dist.environment import cluster_address, ray_address
from cifar_dist.errors import UserError
from cifar_dist.options import Section, option
from cifar_dist.uris import absolute_uri, join_uri


def worker_range(value: Any) -> str:
    """Returns '4' or '1:4' from text or a number. Raises ValueError for other values."""
    text = str(value)
    if type(value) not in (int, str) or not re.fullmatch(r"-?\d+(:-?\d+)?", text):
        raise ValueError(f"{value!r} is neither a number of workers nor a range such as 1:4")
    return text


OWN_CLUSTER = "local"  # as --address


@dataclass(frozen=True, kw_only=True)
class ClusterAddress(Section):
    """The cluster that a job joins."""

    table, heading = "cluster", "where it runs"

    address: str | None = option(
        None, help="HOST:PORT of a Ray cluster (default: RAY_ADDRESS, else the job starts one)", metavar="HOST:PORT"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = ray_address() if self.address is None else self.address
        object.__setattr__(self, "address", cluster_address(given or "") or OWN_CLUSTER)

    @property
    def cluster(self) -> str | None:
        """The address of the cluster to join; None where the job starts one."""
        return None if self.address == OWN_CLUSTER else self.address


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(ClusterAddress):
    """Where a job runs, and on which devices."""

    device: str = option("auto", help="auto: GPUs if the cluster has any", choices=("auto", "cpu", "gpu"), common=True)
    staging_folder: str | None = option(
        None,
        help="local folder for staged data (default: in the temporary folder)",
        metavar="FOLDER",
        parse=os.path.abspath,
    )


@dataclass(frozen=True, kw_only=True)
class Launch(ClusterSettings):
    """How a run is launched: data, storage, workers and limits. None of these changes what is learned."""

    table, heading = "launch", "launch"

    recipe: str = option(help="named settings; other options override them", metavar="NAME", common=True)
    data: str = option(help="the prepared data set", metavar="URI", common=True)
    storage: str = option(help="shared folder of all runs", metavar="URI", common=True)
    name: str = option(help="name of the run, a folder in --storage", metavar="RUN", common=True)
    workers: str = option(
        "1",
        help="data-parallel workers; MIN:MAX: as many as the cluster has, which may change during the run",
        metavar="N|MIN:MAX",
        parse=worker_range,
        common=True,
    )
    max_failures: int = option(3, help="failures of workers after which the run is given up", minimum=0)
    collective_timeout_seconds: int | None = option(
        None, help="seconds that workers wait for one that hangs (default: 600 on GPUs, 120 on CPUs)", minimum=1
    )
    resize_seconds: float = option(60.0, help="MIN:MAX: seconds between looks for more workers", minimum=1)
    profile: bool = option(False, help="store torch.profiler's trace of five steps in the run's folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.num_workers if self.min_workers is None else self.min_workers
        if not 1 <= least <= self.num_workers:
            raise UserError(f"--workers must be 1 or more, or a range such as 1:4, not {self.workers}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise UserError(
                f"--name {self.name!r} is no run name: up to 100 letters, digits, dots, dashes and underscores, "
                "beginning with a letter or digit; a folder goes into --storage"
            )

    def limit_seconds(self, *, gpu: bool) -> int:
        """Returns the limit of every wait of one worker for another.

        On GPUs, NCCL ends the process of a worker that waits longer, so the limit is generous there."""
        return self.collective_timeout_seconds or (600 if gpu else 120)

    @property
    def num_workers(self) -> int:
        """The number of workers, or the maximum of a range."""
        return int(self.workers.rpartition(":")[2])

    @property
    def min_workers(self) -> int | None:
        """The minimum of a range. None without a range."""
        least = self.workers.rpartition(":")[0]
        return int(least) if least else None

    @property
    def run_uri(self) -> str:
        return join_uri(absolute_uri(self.storage), self.name)


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Section):
    """The source of a data set."""

    table, heading = "source", "source of the images"

    source: str = option(
        help="what to read; folder: pictures in any usual layout or archive",
        choices=("cifar10", "folder", "parquet", "shapes"),
        metavar="SOURCE",
        common=True,
    )
    path: str | None = option(
        None,
        help="folder, archive or URI of the source (cifar10: where to keep its download)",
        metavar="PATH",
        common=True,
    )
    labels: str | None = option(
        None, help="table of paths and labels (.csv, .tsv, .jsonl), here or below --path", metavar="FILE", common=True
    )
    image_column: str | None = option(None, help="column of the pictures in a table, or of their paths", metavar="NAME")
    label_column: str | None = option(None, help="column of the labels in a table", metavar="NAME")
    skip_bad: bool = option(False, help="leave unreadable images out and list them in _left_out.jsonl", common=True)
    max_bad_share: float = option(
        0.01, help="share of a class's images that --skip-bad may leave out", minimum=0, maximum=1
    )
    check: str = option(
        "full",
        help="full: decode each image; fast: take plain files by header, size and end, so damage inside may be missed",
        choices=("full", "fast"),
    )
    max_pixels: int = option(  # DALI decodes to less than 2 GiB
        178_956_970, help="most pixels of an image", minimum=1, maximum=2**31 // 3
    )
    alpha: str = option(
        "drop",
        help="transparent images: drop the transparency, or lay them on white or black",
        choices=("drop", "white", "black"),
    )
    near_duplicates: bool = option(False, help="look for images that look alike, for the data card")
    overwrite: bool = option(False, help="replace an existing data set, or files of the same names", common=True)
    tasks: int = option(
        0, help="parallel tasks that prepare (0: one for each CPU of the machine or cluster)", minimum=0
    )
    test_fraction: float = option(0.2, help="share drawn for test where the source has no test split")
    data_seed: int = option(0, help="seed of that draw, and of the shapes", minimum=0)
    num_train: int = option(1000, help="shapes: images to draw for train")
    num_test: int = option(500, help="shapes: images to draw for test")

    def __post_init__(self) -> None:
        if isinstance(self.test_fraction, int | float) and not 0 < self.test_fraction < 1:
            raise UserError(f"--test-fraction must lie between 0 and 1, not {self.test_fraction}")
        super().__post_init__()
        if self.source == "shapes" and self.path:
            raise UserError("--source shapes draws its images and reads no --path")
        if self.near_duplicates and self.check == "fast":
            raise UserError("--near-duplicates compares pixels, which --check fast does not read; use --check full")
        if self.source not in ("folder", "parquet") and (self.labels or self.image_column or self.label_column):
            raise UserError(f"--labels, --image-column and --label-column are for --source folder, not {self.source}")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Section):
    """How runs are evaluated."""

    table, heading = "evaluation", "evaluation"

    splits: tuple[str, ...] = option(
        ("train", "validation", "test"),
        help="splits to evaluate",
        choices=("train", "validation", "test"),
        metavar="SPLIT",
        common=True,
    )
    shards: int = option(
        0, help="parallel tasks (0: as many as the cluster has CPUs or GPUs)", metavar="N", common=True
    )
    flip_tta: bool = option(False, help="score flipped images too, reported as SPLIT+flip")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards < 0:
            raise UserError(f"--shards must be 1 or more, not {self.shards}")
