"""Makes the plan of a run: checks settings, data and a stored run of the same name against each other.

This module writes nothing. Functions import torch only where they need it, because that takes seconds, and a fault in
the settings must be reported at once.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from cifar_dist.config import FREE_ON_RESUME, Config
from cifar_dist.data import order
from cifar_dist.data.manifest import Manifest
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet, use_decoded
from cifar_dist.deck import choices
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.options import flag_of
from cifar_dist.run.folder import Run
from cifar_dist.run.splits import split_ids, validation_source
from cifar_dist.train.job import Plan
from cifar_dist.uris import absolute_uri


def make_plan(config: Config, launch: Launch) -> Plan:
    """Returns the plan. Raises UserError if settings, data and the stored run do not fit each other."""
    data = DataSet.open(launch.data, Staging(folder=launch.staging_folder))
    run = Run(launch.run_uri)
    if config.model.weights:
        config = config.replace(weights=absolute_uri(config.model.weights))
    check_data(config, launch, data.manifest)
    weights = describe_weights(config, data.manifest)
    card = {
        "config": config.to_dict(),
        "manifest_sha256": data.manifest.sha256,
        "weights": weights,
        "recipe": launch.recipe,
        "data_uri": launch.data,
        "num_workers": launch.num_workers,
        "chosen_where_the_deck_is_silent": choices(config, own_validation=data.manifest.has_validation),
    }
    latest = run.checkpoints.latest()
    if latest and latest.meta["model"] == config.model.model:  # load() refuses another model
        run.checkpoints.check_version(latest)
    check_stored(card, run, config.model.weights)
    is_finished = False
    if latest and latest.cursor.epoch >= config.loop.epochs:
        from cifar_dist.run.network import expected_of  # noqa: PLC0415

        # If the latest checkpoint is damaged, the run is not finished.
        found = run.checkpoints.load_newest(expected_of(config, data.manifest))
        is_finished = found is not None and found[0].cursor.epoch >= config.loop.epochs
    return Plan(config=config, launch=launch, run=run, data=data, weights=weights, card=card, is_finished=is_finished)


def describe_weights(config: Config, manifest: Manifest) -> dict[str, Any] | None:
    """Returns facts about the --weights file, or None without that option.

    Loads the file into a separate network, so that a file that does not fit is found before anything is stored."""
    if not config.model.weights:
        return None
    import torch  # noqa: PLC0415

    from cifar_dist.run.network import build_model, image_spec, load_start_weights  # noqa: PLC0415

    cpu = torch.device("cpu")
    return load_start_weights(config, build_model(config, manifest.num_classes, image_spec(config, cpu), cpu))


def check_data(config: Config, launch: Launch, manifest: Manifest) -> None:
    batch = config.loop.global_batch_size
    if batch < launch.num_workers:
        raise UserError(f"--global-batch-size {batch} is less than one image for each of {launch.num_workers} workers")
    # Only the labels decide the size of the validation split, so their order does not matter here.
    labels = np.repeat(np.arange(manifest.num_classes), manifest.splits["train"]["num_rows_per_class"])
    rest, validation = (len(ids) for ids in split_ids(config.replace(train_images=0), manifest, labels))
    if not validation:
        if manifest.has_validation:
            raise UserError(f"the validation split of {launch.data} has no images; prepare the data set again")
        raise UserError(f"no class of {launch.data} has the 2 train images that a validation split needs")
    if config.data.train_images > rest:
        held_out = "" if manifest.has_validation else f", of which {validation} are held out for validation"
        raise UserError(
            f"--train-images is {config.data.train_images}, the data set has {manifest.num_rows('train')} train images"
            f"{held_out}"
        )
    size, micro_batches = min(batch, config.data.train_images or rest), config.loop.accumulation_steps
    if order.fewest_per_micro_batch(size, launch.num_workers, micro_batches) < order.LEAST_PER_RANK:
        raise UserError(
            f"a batch of {size} images on {launch.num_workers} workers in {micro_batches} accumulation steps leaves a "
            "worker with one image at a time: BatchNorm over a single value makes every gradient behind it exactly 0, "
            "so nothing is learned; raise --global-batch-size, or lower --workers or --accumulation-steps"
        )
    decoded_splits(config, manifest)


def decoded_splits(config: Config, manifest: Manifest) -> list[str]:
    """Returns the splits of training whose decoded pixels are kept. Raises UserError if --cache decoded cannot be."""
    cache, budget_mib = config.data.cache, config.data.cache_budget_mib
    return [
        split
        for split in manifest.training_splits
        if use_decoded(manifest.image_shape(split), manifest.num_rows(split), cache, budget_mib)
    ]


def ineffective_settings(given: Collection[str], plan: Plan) -> str | None:
    """Returns a warning if `given`, names of settings, holds some that do nothing with the plan's data set, or None."""
    if not plan.data.manifest.has_validation:
        return None
    # With --train-images the seed also draws these images.
    idle = ["validation_fraction", *["split_seed"] * (not plan.config.data.train_images)]
    if names := [flag_of(name) for name in idle if name in given]:
        source = validation_source(plan.config, plan.data.manifest)
        return f"{' and '.join(names)} will have no effect: the validation images are {source}"
    return None


def check_stored(card: dict[str, Any], run: Run, weights_uri: str) -> None:
    """Compares the card with that of a stored run of this name. Raises UserError if they do not fit."""
    try:
        stored = stored_card(run)
        if stored is None:
            refuse_foreign(run)
            return
        old_data, weights = stored["manifest_sha256"], stored.get("weights") or {}
        old_start, old_sha = weights.get("uri", "random weights"), weights.get("sha256")
        # Settings that an earlier version did not have count as defaults.
        old_values = Config().values() | flat(stored["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{run.uri}/config.json is damaged ({error}); use another --name, or, if the run "
            "has a checkpoint, remove that file: checkpoints say the same"
        ) from error
    if old_data != card["manifest_sha256"]:
        raise UserError(f"the run {run.name} was started on another data set; use another --name")
    if old_sha != (card["weights"] or {}).get("sha256"):
        raise UserError(
            f"the run {run.name} was started from {old_start}, which --weights "
            f"{weights_uri or 'that is not given'} is not; name the same file, or use another --name"
        )
    for name, value in flat(card["config"]).items():
        old = old_values.get(name)
        if old != value and name not in FREE_ON_RESUME:
            raise UserError(
                f"the run {run.name} was started with {name}={old}, not {value}; use the same setting to "
                "continue it, or another --name"
            )


def stored_card(run: Run) -> dict[str, Any] | None:
    """Returns the card of a stored run, or its latest meta.json, which holds the same facts. None for a new run."""
    try:
        return run.read_card()
    except FileNotFoundError:
        latest = run.checkpoints.latest()
        return latest.meta if latest else None


def flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: value for section in sections.values() for name, value in section.items()}


def refuse_foreign(run: Run) -> None:
    """Raises UserError if a new run's folder holds files that no run writes before its card."""
    if others := sorted({*run.folder.names()} - {"attempts", "preflight", "checkpoints"}):
        raise UserError(
            f"{run.uri} is no run: it has no config.json and no checkpoint, but {others[0]}, which is left "
            "alone; use another --name"
        )


def explain_resume(plan: Plan) -> str:
    """Returns lines that tell what the run would load and why. Reads and verifies checkpoints as a resume does."""
    from cifar_dist.run.network import expected_of  # noqa: PLC0415

    config, checkpoints = plan.config, plan.run.checkpoints
    number, _ = plan.run.attempts().newest()
    lines = [f"run {plan.run.uri}: {number} attempts so far, {config.loop.epochs} epochs wanted"]

    def note(name: str, fault: str) -> None:
        lines.append(f"  {name}: {'PASSED OVER: ' + fault if fault else 'whole, the newest that can be read'}")

    found = checkpoints.load_newest(expected_of(config, plan.data.manifest), note)
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
