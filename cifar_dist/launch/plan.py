"""What a run is to do: where and how it is launched, held against its settings, its data and what is stored.

Nothing is written here. Torch takes seconds to import, so that only what needs it imports it: a fault in the settings
is said at once.
"""

from typing import Any

import numpy as np

from cifar_dist.config import FREE_ON_RESUME, Config, Launch
from cifar_dist.data import order
from cifar_dist.data.manifest import Manifest, read_manifest
from cifar_dist.data.staged import use_decoded
from cifar_dist.deck import choices
from cifar_dist.errors import UserError
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import from_json, is_sealed
from cifar_dist.storage import Folder
from cifar_dist.train.job import Plan
from cifar_dist.uris import absolute_uri


def make_plan(config: Config, launch: Launch) -> Plan:
    """Raises UserError for settings, data or a stored run that do not fit each other."""
    data_uri = absolute_uri(launch.data_uri)
    if config.model.weights:
        config = config.replace(weights=absolute_uri(config.model.weights))
    manifest = read_manifest(data_uri)
    check_data(config, launch, manifest)
    weights = None
    if config.model.weights:  # into a network of its own: what does not fit is found before anything is stored
        import torch  # noqa: PLC0415

        from cifar_dist.run.network import build_model, image_spec, load_start_weights  # noqa: PLC0415

        cpu = torch.device("cpu")
        weights = load_start_weights(config, build_model(config, manifest.num_classes, image_spec(config, cpu), cpu))
    card = {
        "config": config.to_dict(),
        "manifest_sha256": manifest.sha256,
        "weights": weights,
        "recipe": launch.recipe,
        "data_uri": launch.data_uri,
        "num_workers": launch.num_workers,
        "chosen_where_the_deck_is_silent": choices(config),
    }
    checkpoints = Checkpoints(launch.run_uri)
    found: Any = checkpoints.latest()
    if found and found.meta["model"] == config.model.model:  # load() refuses another model
        checkpoints.check_version(found)
    check_stored(card, launch, config.model.weights)
    if found and found.cursor.epoch >= config.loop.epochs:
        from cifar_dist.run.network import expected_of  # noqa: PLC0415

        # If that one is damaged there is something to do.
        found, _ = checkpoints.load_newest(expected_of(config, manifest)) or (None, None)
    is_finished = bool(found) and found.cursor.epoch >= config.loop.epochs
    return Plan(config, launch, data_uri, manifest, weights, card, is_finished)


def check_data(config: Config, launch: Launch, manifest: Manifest) -> None:
    batch = config.loop.global_batch_size
    if batch < launch.num_workers:
        raise UserError(f"--global-batch-size {batch} is less than one image for each of {launch.num_workers} workers")
    num_train = manifest.num_rows("train")
    # As the split does: the labels alone decide how many images validate.
    labels = np.repeat(np.arange(manifest.num_classes), manifest.splits["train"]["num_rows_per_class"])
    rest, validation = (len(ids) for ids in order.train_validation_ids(labels, config.data.validation_fraction, 0, 0))
    if not validation:
        raise UserError(f"no class of {launch.data_uri} has the 2 train images that a validation split needs")
    if config.data.train_images > rest:
        raise UserError(
            f"--train-images is {config.data.train_images}, the data set has {num_train} train images, of which "
            f"{validation} are held out for validation"
        )
    size, micro_batches = min(batch, config.data.train_images or rest), config.loop.accumulation_steps
    if order.fewest_per_micro_batch(size, launch.num_workers, micro_batches) < order.LEAST_PER_RANK:
        raise UserError(
            f"a batch of {size} images on {launch.num_workers} workers in {micro_batches} accumulation steps leaves a "
            "worker with one image at a time: BatchNorm over a single value makes every gradient behind it exactly 0, "
            "so nothing is learned; raise --global-batch-size, or lower --workers or --accumulation-steps"
        )
    use_decoded(manifest.image_shape("train"), num_train, config.data.cache, config.data.cache_budget_mib)


def check_stored(card: dict[str, Any], launch: Launch, weights_uri: str) -> None:
    """Holds the card against the one of the stored run of this name, if there is one."""
    try:
        try:
            stored = from_json(Folder(launch.run_uri).read("config.json"))
            if not is_sealed(stored):
                raise ValueError("it does not match its own checksum")
        except FileNotFoundError:
            latest = Checkpoints(launch.run_uri).latest()
            if latest is None:
                refuse_foreign(launch)
                return
            stored = latest.meta  # it says the same
        old_data, weights = stored["manifest_sha256"], stored.get("weights") or {}
        old_start, old_sha = weights.get("uri", "random weights"), weights.get("sha256")
        # A setting that an earlier version did not have was at its default.
        default = {name: value for section in Config().to_dict().values() for name, value in section.items()}
        old_values = default | {n: value for section in stored["config"].values() for n, value in section.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{launch.run_uri}/config.json is damaged ({error}); use another --name, or, if the run "
            "has a checkpoint, remove that file: checkpoints say the same"
        ) from error
    if old_data != card["manifest_sha256"]:
        raise UserError(f"the run {launch.name} was started on another data set; use another --name")
    if old_sha != (card["weights"] or {}).get("sha256"):
        raise UserError(
            f"the run {launch.name} was started from {old_start}, which --weights "
            f"{weights_uri or 'that is not given'} is not; name the same file, or use another --name"
        )
    for name, value in [item for section in card["config"].values() for item in section.items()]:
        old = old_values.get(name)
        if old != value and name not in FREE_ON_RESUME:
            raise UserError(
                f"the run {launch.name} was started with {name}={old}, not {value}; use the same setting to "
                "continue it, or another --name"
            )


def refuse_foreign(launch: Launch) -> None:
    """Raises UserError where a new run's folder holds what no run writes before its card."""
    if others := sorted({*Folder(launch.run_uri).names()} - {"attempts", "preflight", "checkpoints"}):
        raise UserError(
            f"{launch.run_uri} is no run: it has no config.json and no checkpoint, but {others[0]}, which is left "
            "alone; use another --name"
        )


def explain_resume(plan: Plan) -> str:
    """What the run would load and why, as lines; reads and verifies as a resume does."""
    from cifar_dist.run.network import expected_of  # noqa: PLC0415

    run_uri, config = plan.launch.run_uri, plan.config
    checkpoints = Checkpoints(run_uri)
    number, _ = Attempts(Folder(run_uri), "").newest()
    lines = [f"run {run_uri}: {number} attempts so far, {config.loop.epochs} epochs wanted"]

    def note(name: str, fault: str) -> None:
        lines.append(f"  {name}: {'PASSED OVER: ' + fault if fault else 'whole, the newest that can be read'}")

    found = checkpoints.load_newest(expected_of(config, plan.manifest), note)
    if found is None:
        return "\n".join([*lines, "would start from the beginning: there is no checkpoint"])
    checkpoint, _ = found
    best = checkpoints.best()
    for other in reversed(checkpoints.scan()[0]):
        if other.age < checkpoint.age:
            lines.append(f"  {other.name}: older{', kept as the best' if other == best else ''}")
    meta = checkpoint.meta
    place = (
        f"{checkpoint.cursor.epoch} epochs and {checkpoint.cursor.step} steps done, global step {meta['global_step']}"
    )
    if plan.is_finished:
        return "\n".join([*lines, f"would do nothing: the run is finished ({place})"])
    workers = f"written by {meta.get('world_size')} workers in attempt {meta['attempt']}"
    return "\n".join([*lines, f"would load {checkpoint.name}: {place}; {workers}"])
