"""The loader: right images, labels, augmentation in the planned order; plans that cover all for any world size."""

import dataclasses
import io
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prepared import put_unchecked

from cifar_dist.data import order, sources, store
from cifar_dist.data.batch import Batch
from cifar_dist.data.loader import Loader, use_decoded
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.order import STEPS_PER_DRAW, BatchPlan, ImageSpec, eval_plans, train_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.recipes import recipe_config
from cifar_dist.run.network import image_spec
from cifar_dist.run.splits import split_ids

WORLDS = [1, 2, 3, 5]
FLIPS = order.ImageSpec(image_size=32, flips="both")
AUGMENTATION = order.ImageSpec(image_size=32, flips="both", crop_padding=4, cutout_size=8)


def open_loader(
    uri: str, staging_folder: Path, split: str = "train", cache: str = "auto", size: int = 32, **options: Any
) -> Loader:
    spec, cpu = ImageSpec(image_size=size, input_range="0..255", channels_last=True), torch.device("cpu")
    data = DataSet.open(uri, Staging(folder=staging_folder))
    settings = {"device": cpu, "num_threads": 1, "max_batch_size": 32, "cache": cache, **options}
    return Loader(data, split, spec, **settings)


@pytest.fixture(scope="module")
def train_pixels() -> np.ndarray:
    """uint8 [200, 32, 32, 3]: the train split of `shapes_uri`, drawn anew."""
    return np.stack([sources.draw_shape(i % 10, (0, 0, i)) for i in range(200)])


def equal(one: Batch, other: Batch) -> bool:
    counts = (one.num_counted, one.global_size) == (other.num_counted, other.global_size)
    return counts and (one.ids == other.ids).all() and torch.equal(one.images, other.images)


# Batches


@pytest.mark.parametrize("cache", ["encoded", "decoded"])
def test_batches_hold_the_planned_images_flips_and_labels(
    shapes_uri: str, staging_folder: Path, train_pixels: np.ndarray, cache: str
):
    loader = open_loader(shapes_uri, staging_folder, cache=cache)
    plans = list(
        train_plans(np.arange(200), FLIPS, seed=7, epoch=1, first_step=0, global_batch_size=32, rank=0, world=1)
    )
    batches = list(loader.batches(plans))
    assert [len(batch.images) for batch in batches] == [32] * 6 + [8]  # the last one is smaller
    for plan, batch in zip(plans, batches, strict=True):
        assert (batch.ids == plan.ids).all()
        assert batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == [i % 10 for i in plan.ids]
        assert (batch.num_counted, batch.global_size) == (len(plan.ids), len(plan.ids))
        for image, i, (horizontal, vertical) in zip(batch.images, plan.ids, plan.augment.flips, strict=True):
            expected = train_pixels[i][:: -1 if vertical else 1, :: -1 if horizontal else 1]
            assert (image.permute(1, 2, 0).numpy() == expected).all()


@pytest.mark.parametrize("size", [32, 48])
def test_the_cache_does_not_change_a_bit(shapes_uri: str, staging_folder: Path, size: int):
    plans = list(
        train_plans(np.arange(40), FLIPS, seed=0, epoch=0, first_step=0, global_batch_size=16, rank=0, world=1)
    )
    encoded, decoded = (
        list(open_loader(shapes_uri, staging_folder, cache=cache, size=size).batches(plans))
        for cache in ("encoded", "decoded")
    )
    assert all(map(equal, encoded, decoded))


def test_images_of_several_sizes_and_formats(tmp_path: Path, staging_folder: Path):
    def jpeg(height: int, width: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (200, 100, 50)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    items = [sources.Item("a", 0, partial(jpeg, 20, 31)), sources.Item("b", 1, lambda: np.zeros((9, 9, 3), np.uint8))]
    source = sources.Source.of("mixed", ["a", "b"], {"train": items, "test": items})
    store.prepare(source, str(tmp_path / "out"))
    loader = open_loader(str(tmp_path / "out"), staging_folder)
    assert loader.decoded is None
    (batch,) = loader.batches(eval_plans(np.arange(2), 2, 0, 1))
    assert batch.images.shape == (2, 3, 32, 32)
    assert np.abs(batch.images[0].mean((1, 2)).numpy() - [200, 100, 50]).max() < 3
    assert batch.images[1].abs().max() == 0


@pytest.mark.parametrize("size", [32, 224])
def test_batches_that_are_kept_stay_as_they_were(shapes_uri: str, staging_folder: Path, size: int):
    """Batches lie in DALI's own memory: each must be left alone for as long as anyone holds it, and no longer."""
    loader = open_loader(shapes_uri, staging_folder, size=size)
    plans = list(
        train_plans(np.arange(200), FLIPS, seed=0, epoch=0, first_step=0, global_batch_size=32, rank=0, world=1)
    )
    kept, copies = [], []
    for batch in loader.batches(plans):
        kept.append(batch)
        copies.append(batch.images.clone())
    for _ in loader.batches(plans):
        pass
    del loader
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


def test_no_plans_give_no_batches(shapes_uri: str, staging_folder: Path):
    assert list(open_loader(shapes_uri, staging_folder).batches([])) == []


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_leaving_early_does_not_disturb_the_next_iteration(shapes_uri: str, staging_folder: Path, taken: int):
    loader = open_loader(shapes_uri, staging_folder)
    plans = list(eval_plans(np.arange(24), 8, 0, 1))
    whole = list(loader.batches(plans))
    iterator = loader.batches(plans)
    for _ in range(taken):
        next(iterator)
    iterator.close()
    assert all(map(equal, loader.batches(plans), whole))


@pytest.mark.parametrize("channels_last", [False, True])
def test_synthetic_batches_are_one_random_batch_under_the_plans_of_the_data(
    shapes_uri: str, staging_folder: Path, channels_last: bool
):
    spec = dataclasses.replace(AUGMENTATION, input_range="-1..1", channels_last=channels_last)
    data = DataSet.open(shapes_uri, Staging(folder=staging_folder))
    settings: Any = {"device": torch.device("cpu"), "num_threads": 1, "max_batch_size": 32, "cache_budget_mib": 64}
    first, again, real = (
        Loader(data, "train", spec, **settings, synthetic=synthetic) for synthetic in (True, True, False)
    )
    plans = list(
        train_plans(np.arange(200), AUGMENTATION, seed=7, epoch=1, first_step=0, global_batch_size=32, rank=0, world=1)
    )
    batches = list(first.batches(plans))
    whole = batches[0]
    for batch, other, wanted in zip(batches, again.batches(plans), real.batches(plans), strict=True):
        n = len(wanted.ids)
        assert (batch.ids == wanted.ids).all()
        assert (batch.num_counted, batch.global_size) == (wanted.num_counted, wanted.global_size)
        for made, read in ((batch.images, wanted.images), (batch.labels, wanted.labels)):
            assert (made.shape, made.dtype, made.stride()) == (read.shape, read.dtype, read.stride())
        assert torch.equal(batch.images, whole.images[:n])
        assert torch.equal(batch.labels, whole.labels[:n])
        assert equal(batch, other)
        assert torch.equal(batch.labels, other.labels)
    assert len(whole.images.unique(dim=0)) == 32
    assert -1 <= whole.images.min() < -0.99
    assert 0.99 < whole.images.max() <= 1
    assert len(set(whole.labels.tolist())) > 5
    assert 0 <= whole.labels.min() <= whole.labels.max() < 10


def test_synthetic_data_decodes_nothing(tmp_path: Path, staging_folder: Path):
    prepare_with_a_bad_picture(tmp_path / "out")
    loader = open_loader(str(tmp_path / "out"), staging_folder, cache="decoded", synthetic=True)
    assert [len(batch.images) for batch in loader.batches(eval_plans(np.arange(20), 8, 0, 1))] == [8, 8, 4]
    assert not list(staging_folder.rglob("train.decoded"))


# Caches


@pytest.mark.parametrize(
    ("shape", "num_images", "cache", "budget_mib", "expected"),
    [
        ((32, 32), 50_000, "auto", 147, True),  # 146.5 MiB
        ((32, 32), 50_000, "auto", 146, False),
        ((32, 32), 50_000, "decoded", 0, True),
        ((32, 32), 50_000, "encoded", 9999, False),
        (None, 10, "auto", 9999, False),
        (None, 10, "encoded", 9999, False),
    ],
)
def test_which_cache_is_used(
    shape: tuple[int, int] | None, num_images: int, cache: str, budget_mib: int, expected: bool
):
    assert use_decoded(shape, num_images, cache, budget_mib) is expected


def test_a_decoded_cache_of_unequal_images_is_refused():
    with pytest.raises(UserError, match="--cache decoded needs images of one size"):
        use_decoded(None, 10, "decoded", 9999)


def test_auto_obeys_the_budget(shapes_uri: str, staging_folder: Path):
    assert open_loader(shapes_uri, staging_folder).decoded is not None
    assert open_loader(shapes_uri, staging_folder, cache_budget_mib=0).decoded is None


def test_the_decoded_cache_is_one_mapped_file_per_node(shapes_uri: str, staging_folder: Path, train_pixels: np.ndarray):
    first = open_loader(shapes_uri, staging_folder)
    (file,) = staging_folder.rglob("train.decoded")
    made = file.stat()
    second = open_loader(shapes_uri, staging_folder, size=48)
    assert file.stat() == made
    for loader in (first, second):
        assert isinstance(loader.decoded, np.memmap)
        assert not loader.decoded.flags.writeable
        assert (loader.decoded == train_pixels).all()


def test_a_damaged_decoded_cache_is_made_again(shapes_uri: str, staging_folder: Path, train_pixels: np.ndarray):
    open_loader(shapes_uri, staging_folder)
    (file,) = staging_folder.rglob("train.decoded")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-10])
    assert (open_loader(shapes_uri, staging_folder).decoded == train_pixels).all()


# Faults


def prepare_with_a_bad_picture(out: Path) -> None:
    """Shapes as a program without checks would store them: row 13 of train holds text."""
    store.prepare(sources.shapes(20, 20), str(out))
    put_unchecked(out, b"this is no picture", row=13)


@pytest.mark.parametrize("cache", ["encoded", "decoded"])
def test_a_bad_image_in_the_store_is_named_by_path_and_row(tmp_path: Path, staging_folder: Path, cache: str):
    prepare_with_a_bad_picture(tmp_path / "out")

    def read_all() -> None:
        loader = open_loader(str(tmp_path / "out"), staging_folder, cache=cache)
        list(loader.batches(eval_plans(np.arange(20), 8, 0, 1)))

    with pytest.raises(UserError, match=r"image train-00013\.png \(row 13 of train\) cannot be decoded") as caught:
        read_all()
    text = str(caught.value)
    assert "\n" not in text
    assert "decoded: DALI says" in text
    assert "nvImageCodec failure" in text
    assert "traceback" not in text
    assert text.endswith("prepare the data set again: that checks every image and names those that are damaged")
    assert not list(staging_folder.rglob("train.decoded"))


def test_images_before_a_bad_one_are_still_had(tmp_path: Path, staging_folder: Path):
    prepare_with_a_bad_picture(tmp_path / "out")
    loader = open_loader(str(tmp_path / "out"), staging_folder, cache="encoded")
    assert len(list(loader.batches(eval_plans(np.arange(13), 8, 0, 1)))) == 2


def test_a_damaged_data_set_is_refused(shapes_uri: str, tmp_path: Path, staging_folder: Path):
    shutil.copy(Path(shapes_uri, "_manifest.json"), tmp_path)
    with pytest.raises(UserError, match="missing; prepare the data set again"):
        open_loader(str(tmp_path), staging_folder)


# Plans


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize(("count", "batch_size"), [(100, 8), (101, 10), (7, 8), (1, 1)])
def test_evaluation_sees_every_id_exactly_once(count: int, batch_size: int, world: int):
    ids = np.random.default_rng(0).permutation(1000)[:count]
    plans = [plan for rank in range(world) for plan in eval_plans(ids, batch_size, rank, world)]
    assert np.concatenate([plan.ids for plan in plans]).tolist() == ids.tolist()
    assert all(plan.num_counted == plan.global_size == len(plan.ids) <= batch_size for plan in plans)
    assert all(plan.augment is None for plan in plans)


def test_evaluation_batches_do_not_depend_on_the_world_size():
    grids = [
        [plan.ids.tolist() for rank in range(world) for plan in eval_plans(np.arange(103), 10, rank, world)]
        for world in [*WORLDS, 40]
    ]
    assert all(grid == grids[0] for grid in grids)


def test_evaluation_is_shared_evenly():
    for world in WORLDS:
        counts = [len(list(eval_plans(np.arange(103), 10, rank, world))) for rank in range(world)]
        assert max(counts) - min(counts) <= 1


def global_steps(world: int, **changes: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Per step, the ids that count and what is drawn for them (flips, crop, hole), over all ranks in their order."""
    settings = {
        "ids": np.arange(500, 603),
        "spec": AUGMENTATION,
        "seed": 3,
        "epoch": 2,
        "first_step": 0,
        "global_batch_size": 10,
    }
    ranks = [list(train_plans(**settings | changes, rank=rank, world=world)) for rank in range(world)]
    steps = []
    for parts in zip(*ranks, strict=True):
        assert sum(part.num_counted for part in parts) == parts[0].global_size
        assert len({part.global_size for part in parts}) == 1
        ids = np.concatenate([part.ids[: part.num_counted] for part in parts])
        drawn = np.concatenate([np.concatenate(part.augment, axis=1)[: part.num_counted] for part in parts])
        steps.append((ids.tolist(), drawn.tolist()))
    return steps


@pytest.mark.parametrize("world", WORLDS)
def test_global_batches_do_not_depend_on_the_world_size(world: int):
    steps = global_steps(world)
    assert [len(ids) for ids, _ in steps] == [10] * 10 + [3]
    ids = np.concatenate([ids for ids, _ in steps])
    assert (ids == 500 + order.epoch_order(3, 2, 103)).all()
    drawn = np.concatenate([drawn for _, drawn in steps])
    assert (drawn == np.concatenate(AUGMENTATION.draw(3, 2, ids), axis=1)).all()
    assert (drawn[:, :2] == order.flips(3, 2, ids)).all()
    assert steps == global_steps(1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("first_step", [1, 7, 10, 11])
def test_plans_from_a_cursor_are_the_rest_of_the_epoch(world: int, first_step: int):
    assert global_steps(world, first_step=first_step) == global_steps(1)[first_step:]


@pytest.mark.parametrize("first_step", [0, 40])
def test_an_epoch_of_more_steps_than_are_drawn_at_a_time_is_whole(first_step: int):
    ids = np.arange(3 * STEPS_PER_DRAW + 2)
    steps = global_steps(2, ids=ids, global_batch_size=1, first_step=first_step)
    assert (
        np.concatenate([step for step, _ in steps]).tolist() == order.epoch_order(3, 2, len(ids))[first_step:].tolist()
    )


def test_epochs_and_seeds_change_order_and_augmentation():
    base = global_steps(1)
    for change in ({"epoch": 3}, {"seed": 4}):
        assert global_steps(1, **change)[0][0] != base[0][0]
    other = {i: row for ids, drawn in global_steps(1, epoch=3) for i, row in zip(ids, drawn, strict=True)}
    for columns, most in ((slice(0, 2), 50), (slice(2, 4), 10), (slice(4, 6), 5)):  # expected of 103: 26, 1.3, 0.1
        rows = [(other[i][columns], row[columns]) for ids, drawn in base for i, row in zip(ids, drawn, strict=True)]
        assert sum(one == two for one, two in rows) < most


def test_without_augmentation_nothing_is_changed():
    steps = global_steps(2, spec=order.ImageSpec(image_size=32))
    assert [ids for ids, _ in steps] == [ids for ids, _ in global_steps(2)]
    assert all(row == [0, 0, 0, 0, 32, 32] for _, drawn in steps for row in drawn)


def test_a_rank_without_a_part_works_on_another_s_which_does_not_count(shapes_uri: str, staging_folder: Path):
    """Each rank takes part in each step, or the others would wait for it for ever; a part of a single image would have
    no variance for BatchNorm."""
    loader = open_loader(shapes_uri, staging_folder)
    counted, ids = [], []
    for rank in range(5):
        plans: list[BatchPlan] = list(
            train_plans(np.arange(15), FLIPS, seed=0, epoch=0, first_step=0, global_batch_size=10, rank=rank, world=5)
        )
        first, last = loader.batches(plans)
        assert len(first.images) == 2
        assert len(last.images) == len(last.ids) in (2, 3)
        assert (last.num_counted, last.global_size) == (plans[-1].num_counted, 5)
        counted.append(last.num_counted)
        ids.append(last.ids.tolist())
    assert sorted(counted) == [0, 0, 0, 2, 3]
    assert len({i for part, num in zip(ids, counted, strict=True) if num for i in part}) == 5
    assert all(part in (ids[0], ids[1]) for part in ids)


@pytest.mark.parametrize(("crop_padding", "resize", "antialias"), [(0, "squash", True), (3, "fit", False)])
def test_the_configured_spec_reaches_plans_and_pipeline(crop_padding: int, resize: str, antialias: bool):
    settings: dict[str, Any] = {"crop_padding": crop_padding, "resize": resize, "antialias": antialias}
    settings |= {"flips": "horizontal", "cutout_size": 7}
    config = recipe_config("quickstart_fan", precision="fp32", **settings)
    expected = ImageSpec(image_size=32, input_range="0..1", **settings)
    assert image_spec(config, torch.device("cpu")) == expected
    half = image_spec(config.replace(precision="bf16"), torch.device("cpu"))
    assert half == dataclasses.replace(expected, channels_last=True)


def test_the_validation_rows_are_the_same_whatever_the_run_s_seed(shapes_uri: str) -> None:
    manifest, labels = read_manifest(shapes_uri), np.arange(200) % 10
    one, two, other = (
        split_ids(recipe_config("quickstart_fan", **settings), manifest, labels)[1]
        for settings in ({"seed": 1}, {"seed": 2}, {"seed": 1, "split_seed": 3})
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
