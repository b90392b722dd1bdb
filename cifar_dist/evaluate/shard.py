"""Evaluates one shard of a run: its part of each split, with one checkpoint."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F

from cifar_dist.config import Config
from cifar_dist.data.loader import Loader
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.order import eval_plans
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.evaluate.scores import Counts, count
from cifar_dist.models.frozen import InferenceModel, inference_copy
from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.folder import Run
from cifar_dist.run.network import Precision, build_model, eval_batch, image_spec, use_exact_fp32
from cifar_dist.run.splits import ids_of, stored_split

TOP_K = 5
FLIPPED = "+flip"  # suffix of a split's name: predictions from the mean logits of an image and its mirror image


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` of `num_shards` of the evaluation of one checkpoint. `precision`: fp32, bf16 or fp16."""

    run: Run
    checkpoint: Checkpoint
    data: DataSet
    splits: tuple[str, ...]
    index: int
    num_shards: int
    precision: str = "fp32"
    gpu: bool = False
    num_threads: int = 1
    flip_tta: bool = False


def check_checkpoint(checkpoint: Checkpoint, manifest: Manifest, run: Run) -> None:
    """Raises UserError if the checkpoint was trained on another data set or has unknown settings."""
    trained_on = str(checkpoint.meta.get("manifest_sha256"))
    if trained_on != manifest.sha256:
        raise UserError(
            f"{run.uri} was trained on another data set ({checkpoint.meta.get('data_uri')}, sha256 {trained_on[:16]}) "
            f"than the one given (sha256 {manifest.sha256[:16]}); name that one with --data"
        )
    try:
        Config.from_dict(checkpoint.meta["config"])
    except (UserError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the checkpoint {checkpoint.name} of {run.uri} has settings of its own: {error}") from error


@torch.inference_mode()
def evaluate_shard(shard: Shard) -> dict[str, tuple[pa.Table, Counts]]:
    """Returns the predictions (id, label, prediction_1..k, probability_1..k, loss) and their counts, by split.

    The batches do not depend on the number of shards, so the results do not either.
    """
    torch.set_num_threads(shard.num_threads)
    use_exact_fp32()
    device = torch.device("cuda", 0) if shard.gpu else torch.device("cpu")
    data = DataSet.open(shard.data.uri, shard.data.staging)  # opened again, because this node may see another data set
    check_checkpoint(shard.checkpoint, data.manifest, shard.run)
    config = Config.from_dict(shard.checkpoint.meta["config"])
    spec = image_spec(config, device)
    precision, batch_size = Precision(shard.precision, device), eval_batch(device, config.data.image_size)
    model = build_model(config, data.manifest.num_classes, spec, device)
    network = load_network(shard, config, model, precision.dtype)

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return network(images).float()

    loaders = {
        stored: Loader(
            data,
            stored,
            spec,
            device=device,
            num_threads=shard.num_threads,
            max_batch_size=batch_size,
            cache=config.data.cache,
            cache_budget_mib=config.data.cache_budget_mib,
        )
        for stored in {stored_split(split, data.manifest) for split in shard.splits}
    }
    results: dict[str, tuple[pa.Table, Counts]] = {}
    for split in shard.splits:
        loader = loaders[stored_split(split, data.manifest)]
        ids = ids_of(split, config, data.manifest, loader.staged.labels)
        plans = eval_plans(ids, batch_size, shard.index, shard.num_shards)
        rows: dict[str, list[list[np.ndarray]]] = {split: [], **({split + FLIPPED: []} if shard.flip_tta else {})}
        for batch in loader.batches(plans):
            logits = logits_of(batch.images)
            rows[split].append(predict(logits, batch.labels, batch.ids))
            if shard.flip_tta:
                both = (logits + logits_of(batch.images.flip(3))) / 2
                rows[split + FLIPPED].append(predict(both, batch.labels, batch.ids))
        results |= {name: collect(parts, data.manifest.num_classes) for name, parts in rows.items()}
    return results


def load_network(shard: Shard, config: Config, model: torch.nn.Module, dtype: torch.dtype) -> InferenceModel:
    """Returns the network with the checkpoint's average of the weights, or with its weights if it has no average."""
    checkpoints = shard.run.checkpoints
    loaded = checkpoints.load(shard.checkpoint, optimizer=False)
    try:
        model.load_state_dict(loaded.average or loaded.model)
    except RuntimeError as error:
        where = checkpoints.where(shard.checkpoint.name)
        raise UserError(f"the weights of {where} do not fit {config.model.model}; train the run again") from error
    return inference_copy(model, dtype)


def predict(logits: torch.Tensor, labels: torch.Tensor, ids: np.ndarray) -> list[np.ndarray]:
    """Returns [ids [n], labels [n], predictions [n, K], probabilities [n, K], loss [n]] of a batch."""
    probabilities, predictions = logits.softmax(1).topk(min(TOP_K, logits.shape[1]))
    loss = F.cross_entropy(logits, labels, reduction="none")
    return [ids, *(t.cpu().numpy() for t in (labels, predictions, probabilities, loss))]


def collect(rows: list[list[np.ndarray]], num_classes: int) -> tuple[pa.Table, Counts]:
    """Combines the rows of any number of batches into a table and counts."""
    k = min(TOP_K, num_classes)
    empty = [np.zeros(shape, kind) for shape, kind in ((0, int), (0, int), ((0, k), int), ((0, k), "f4"), (0, "f4"))]
    ids, labels, predictions, probabilities, loss = (np.concatenate(parts) for parts in zip(empty, *rows, strict=True))
    columns = {"id": ids, "label": labels}
    columns |= {f"prediction_{i + 1}": predictions[:, i] for i in range(k)}
    columns |= {f"probability_{i + 1}": probabilities[:, i] for i in range(k)}
    counts = count(labels, predictions, probabilities[:, 0], loss, num_classes)
    return pa.table({**columns, "loss": loss}), counts
