"""One shard of a run's evaluation: its part of each split through one checkpoint."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from cifar_dist.config import Config
from cifar_dist.data.loader import Loader
from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.order import eval_plans
from cifar_dist.data.staged import Staging
from cifar_dist.errors import UserError
from cifar_dist.evaluate.scores import Counts, count
from cifar_dist.models.frozen import inference_copy
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.network import build_model, image_spec, split_ids

BATCH = 100
TOP_K = 5
SPLITS = ("train", "validation", "test")
FLIPPED = "+flip"  # after a split's name: predictions from the mean of the logits of an image and of its mirror image


@dataclass(frozen=True)
class Shard:
    """Part `index` of `num_shards` of the evaluation of one checkpoint."""

    run_uri: str
    checkpoint: Checkpoint
    data_uri: str
    splits: tuple[str, ...]
    index: int
    num_shards: int
    gpu: bool = False
    num_threads: int = 1
    staging_folder: str | None = None
    flip_tta: bool = False
    job: str = ""  # names the evaluation, whose processes check a staged file once


def check_checkpoint(checkpoint: Checkpoint, manifest: Manifest, run_uri: str) -> None:
    """Refuses a checkpoint that was trained on another data set."""
    trained_on = str(checkpoint.meta.get("manifest_sha256"))
    if trained_on != manifest.sha256:
        raise UserError(
            f"{run_uri} was trained on another data set ({checkpoint.meta.get('data_uri')}, sha256 {trained_on[:16]}) "
            f"than the one given (sha256 {manifest.sha256[:16]}); name that one with --data"
        )
    try:
        Config.from_dict(checkpoint.meta["config"])
    except (UserError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint {checkpoint.name} of {run_uri} has settings of its own: {error}") from error


def stored_split(split: str) -> str:
    """The split at rest that holds the images of `split`: validation is a part of train."""
    return "test" if split.removesuffix(FLIPPED) == "test" else "train"


def ids_of(split: str, config: Config, labels: np.ndarray) -> np.ndarray:
    """The rows of `split`: all of test, or the run's own part of the stored train split."""
    split = split.removesuffix(FLIPPED)
    if split == "test":
        return np.arange(len(labels))
    return split_ids(config, labels)[0 if split == "train" else 1]


@torch.inference_mode()
def evaluate_shard(shard: Shard) -> dict[str, tuple[pa.Table, Counts]]:
    """Per split the predictions (id, label, prediction_1..k, probability_1..k, loss) and their counts.

    Runs in fp32. The batches come from a grid that does not depend on the number of shards, so that neither do the
    results.
    """
    torch.set_num_threads(shard.num_threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda", 0) if shard.gpu else torch.device("cpu")
    manifest = read_manifest(shard.data_uri)
    check_checkpoint(shard.checkpoint, manifest, shard.run_uri)
    config = Config.from_dict(shard.checkpoint.meta["config"])
    spec = image_spec(config, device)
    loaded = Checkpoints(shard.run_uri).load(shard.checkpoint, optimizer=False)
    model = build_model(config, manifest.num_classes, spec, device)
    try:
        model.load_state_dict(loaded.average or loaded.model)
    except RuntimeError as error:
        where = Checkpoints(shard.run_uri).where(shard.checkpoint.name)
        raise UserError(f"the weights of {where} do not fit {config.model.model}; train the run again") from error
    network = inference_copy(model)
    cache = config.data.cache, config.data.cache_budget_mib, shard.staging_folder
    loaders = {
        stored: Loader(
            shard.data_uri, manifest, stored, spec, device, shard.num_threads, BATCH, *cache, staging=Staging(shard.job)
        )
        for stored in {stored_split(split) for split in shard.splits}
    }
    results: dict[str, tuple[pa.Table, Counts]] = {}
    for split in shard.splits:
        loader = loaders[stored_split(split)]
        ids = ids_of(split, config, loader.staged.labels)
        plans = eval_plans(ids, BATCH, shard.index, shard.num_shards)
        rows: dict[str, list[list[np.ndarray]]] = {split: [], **({split + FLIPPED: []} if shard.flip_tta else {})}
        for batch in loader.batches(plans):
            logits = network(batch.images).float()
            rows[split].append(predict(logits, batch.labels, batch.ids))
            if shard.flip_tta:
                both = (logits + network(batch.images.flip(3)).float()) / 2
                rows[split + FLIPPED].append(predict(both, batch.labels, batch.ids))
        results |= {name: collect(parts, manifest.num_classes) for name, parts in rows.items()}
    return results


def predict(logits: torch.Tensor, labels: torch.Tensor, ids: np.ndarray) -> list[np.ndarray]:
    """[ids, labels, predictions [n, K], probabilities [n, K], loss] of one batch."""
    probabilities, predictions = logits.softmax(1).topk(min(TOP_K, logits.shape[1]))
    loss = F.cross_entropy(logits, labels, reduction="none")
    return [ids, *(t.cpu().numpy() for t in (labels, predictions, probabilities, loss))]


def collect(rows: list[list[np.ndarray]], num_classes: int) -> tuple[pa.Table, Counts]:
    """One table and one set of counts from the batches (there may be none)."""
    k = min(TOP_K, num_classes)
    empty = [np.zeros(shape, kind) for shape, kind in ((0, int), (0, int), ((0, k), int), ((0, k), "f4"), (0, "f4"))]
    ids, labels, predictions, probabilities, loss = (np.concatenate(parts) for parts in zip(empty, *rows, strict=True))
    columns = {"id": ids, "label": labels}
    columns |= {f"prediction_{i + 1}": predictions[:, i] for i in range(k)}
    columns |= {f"probability_{i + 1}": probabilities[:, i] for i in range(k)}
    counts = count(labels, predictions, probabilities[:, 0], loss, num_classes)
    return pa.table({**columns, "loss": loss}), counts
