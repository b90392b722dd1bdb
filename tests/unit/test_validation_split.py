"""A data set's own validation split: it alone validates, all of train trains, and its rows are never train's."""

import dataclasses
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counting_base import CountingBase
from validation_data import LABELS, draw, items_of, keep_rows, own_validation

from cifar_dist import models
from cifar_dist.config import Config
from cifar_dist.data import order, sources
from cifar_dist.data.joined import JoinedLoader
from cifar_dist.data.loader import Loader
from cifar_dist.data.manifest import read_manifest
from cifar_dist.data.order import BatchPlan, ImageSpec, eval_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.resident import ResidentImages
from cifar_dist.data.staged import DataSet
from cifar_dist.deck import choices
from cifar_dist.errors import UserError
from cifar_dist.job_settings import Launch
from cifar_dist.launch.plan import decoded_splits, ineffective_settings, make_plan
from cifar_dist.launch.preflight import assess, disk, gather_facts, num_bytes_to_stage
from cifar_dist.run.checkpoint import Cursor
from cifar_dist.run.network import Precision
from cifar_dist.run.splits import ids_of, split_ids, stored_split, validation_source
from cifar_dist.train.assemble import open_loaders, split_base
from cifar_dist.train.diagnosis import announce
from cifar_dist.train.features import DeviceFeatures, FeatureCache, Features
from cifar_dist.train.images import Images
from cifar_dist.train.loop import validate

CPU = torch.device("cpu")
NUM_TRAIN, NUM_VALIDATION = 40, len(LABELS)


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """40 train, 20 validation and 20 test images of 32 px."""
    return own_validation(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(scope="module")
def staging(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("staged")


def config_of(**settings: Any) -> Config:
    return Config().replace(**{"input_range": "0..255", "global_batch_size": 10, "flips": "both", **settings})


def open_images(uri: str, staging: Path, *, rank: int = 0, world: int = 1, **settings: Any) -> Images:
    config, data = config_of(**settings), DataSet.open(uri, Staging(folder=staging))
    values = config.data
    spec = ImageSpec(image_size=values.image_size, input_range=values.input_range, flips=values.flips)
    loaders = open_loaders(config, data, spec, CPU, num_threads=1, world=world)
    return Images(*loaders, config, rank=rank, world=world)


def validation_pixels(labels: list[int], size: int = 32) -> torch.Tensor:
    """float32 [n, 3, size, size], 0 to 255: the validation images, drawn anew."""
    pixels = np.stack([draw(i, label, size) for i, label in enumerate(labels)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


# Which images.


def test_all_of_train_trains_and_exactly_the_split_validates(uri):
    manifest, labels = read_manifest(uri), np.arange(NUM_TRAIN) % 10
    train, validation = split_ids(config_of(validation_fraction=0.5), manifest, labels)
    assert train.tolist() == list(range(NUM_TRAIN))
    assert validation.tolist() == list(range(NUM_VALIDATION))
    assert [stored_split(split, manifest) for split in SPLITS] == list(SPLITS)
    for split, n in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION), ("test", 20)):
        assert ids_of(split, config_of(), manifest, np.arange(n) % 10).tolist() == list(range(n))


def test_train_images_limits_train_evenly_and_not_validation(uri):
    manifest, labels = read_manifest(uri), np.arange(NUM_TRAIN) % 10
    for seed in (0, 1):
        train, validation = split_ids(config_of(train_images=20, split_seed=seed), manifest, labels)
        assert np.bincount(labels[train]).tolist() == [2] * 10
        assert train.tolist() == order.drawn_evenly(np.arange(NUM_TRAIN), labels, 20, seed).tolist()
        assert len(validation) == NUM_VALIDATION
    assert ids_of("train", config_of(train_images=20, split_seed=1), manifest, labels).tolist() == train.tolist()


def test_without_the_split_validation_is_drawn_from_train(shapes_uri):
    manifest, labels = read_manifest(shapes_uri), np.arange(200) % 10
    expected = order.train_validation_ids(labels, 0.2, 50, 3)
    config = config_of(validation_fraction=0.2, train_images=50, split_seed=3)
    assert stored_split("validation", manifest) == "train"
    for found in (split_ids(config, manifest, labels), [ids_of(s, config, manifest, labels) for s in SPLITS[:2]]):
        for ids, others in zip(found, expected, strict=True):
            assert np.array_equal(ids, others)
    assert validation_source(config, manifest) == "drawn from train (20%, seed 3)"


SPLITS = ("train", "validation", "test")


# A rank's batches.


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("cache", ["encoded", "decoded"])
def test_validation_batches_are_the_stored_split_each_image_once(uri, staging, cache, world):
    ranks = [open_images(uri, staging, rank=rank, world=world, cache=cache) for rank in range(world)]
    batches = list(chain.from_iterable(images.validation_batches() for images in ranks))
    found = torch.cat([batch.images for batch in batches])
    assert torch.equal(found, validation_pixels(LABELS))
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS
    ids = np.concatenate([batch.ids for batch in batches])
    assert ids.tolist() == list(range(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION))


@pytest.mark.parametrize("cache", ["encoded", "decoded"])
def test_train_batches_are_those_of_train_alone(uri, staging, cache):
    """Also after a validation that was left early, as the compiler's first batch is."""
    images = open_images(uri, staging, cache=cache)
    assert len(list(islice(images.validation_batches(), 1))) == 1
    plain = Loader(images.loader.data, "train", images.loader.spec, device=CPU, num_threads=1, max_batch_size=10)
    alone = Images(plain, None, images.config, rank=0, world=1)
    alone.train_ids = np.arange(NUM_TRAIN)
    found, expected = list(images.train_batches(Cursor(1, 1))), list(alone.train_batches(Cursor(1, 1)))
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.ids.tolist() == other.ids.tolist()
    assert sorted(np.concatenate([batch.ids for batch in images.train_batches(Cursor(0, 0))])) == [*range(NUM_TRAIN)]


@pytest.mark.parametrize("sizes", [(48,), (20, 32)])
def test_validation_images_of_another_size_are_resized(tmp_path, sizes):
    """One size is kept decoded, several are not; train is, at its own size."""
    uri = own_validation(tmp_path / "data", sizes=sizes)
    images = open_images(uri, tmp_path / "staged")
    assert [loader.decoded is not None for loader in (images.loader.first, images.loader.second)] == [
        *(True, len(sizes) == 1)
    ]
    (batch,) = images.validation_batches()
    for i, label in enumerate(LABELS):
        drawn = torch.from_numpy(draw(i, label, sizes[i % len(sizes)])).permute(2, 0, 1)[None].float()
        resized = F.interpolate(drawn, (32, 32), mode="bilinear", align_corners=False)[0]
        assert (batch.images[i] - resized).abs().max() < 0.51
    (first, *_), pixels = images.train_batches(Cursor(0, 0)), items_of(sources.shapes(NUM_TRAIN, 20), "train")
    assert first.labels.tolist() == [pixels[i].label for i in first.ids]


def test_each_split_has_decoded_pixels_of_its_own(uri, tmp_path):
    images = open_images(uri, tmp_path, cache="decoded")
    files = {path.name: path.stat().st_size for path in images.loader.data.area.glob("*.decoded")}
    assert files == {f"{s}.decoded": n * 32 * 32 * 3 + 32 for s, n in (("train", 40), ("validation", NUM_VALIDATION))}


def test_images_in_a_device_s_memory_are_each_split_s_own(uri, staging):
    """What a GPU does: each of the loaders may keep its split there, and the other may not."""
    images = open_images(uri, staging, cache="decoded")
    for loader in (images.loader.second, images.loader.first):
        expected = [list(images.validation_batches()), list(images.train_batches(Cursor(0, 2)))]
        loader.resident = ResidentImages(loader.decoded, loader.staged.labels, loader.spec, CPU)
        found = [list(images.validation_batches()), list(images.train_batches(Cursor(0, 2)))]
        for one, other in zip(chain(*found), chain(*expected), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
            assert one.ids.tolist() == other.ids.tolist()


def test_synthetic_batches_have_the_splits_sizes(uri, staging):
    images = open_images(uri, staging, synthetic_data=True)
    (batch,) = images.validation_batches()
    assert len(batch.images) == len(batch.labels) == NUM_VALIDATION
    assert [len(batch.images) for batch in images.train_batches(Cursor(0, 0))] == [10] * 4


def test_a_split_of_one_image_validates_on_one_rank(tmp_path):
    uri = own_validation(tmp_path / "data", labels=[3])
    ranks = [open_images(uri, tmp_path / "staged", rank=rank, world=2) for rank in (0, 1)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    totals = [validate(model, images.validation_batches(), Precision("fp32", CPU)) for images in ranks]
    assert sorted(seen for _, _, seen in map(torch.Tensor.tolist, totals)) == [0, 1]
    logits = model(validation_pixels([3]))
    expected = [F.cross_entropy(logits, torch.tensor([3])).item(), float(logits.argmax() == 3), 1]
    assert sum(totals).tolist() == pytest.approx(expected, rel=1e-5)


def joined(uri: str, staging: Path) -> JoinedLoader:
    return open_images(uri, staging).loader


def plan_of(*ids: int) -> BatchPlan:
    return BatchPlan(np.array(ids, int), None, len(ids), len(ids))


def test_a_batch_of_two_splits_is_refused(uri, staging):
    loader = joined(uri, staging)
    with pytest.raises(ValueError, match="of two splits"):
        list(loader.batches([plan_of(39, 40)]))
    with pytest.raises(ValueError, match="of two splits"):
        loader.labels(np.array([40, 39]))


def test_batches_come_in_the_planned_order_whatever_split_they_are_of(uri, staging):
    """Also empty ones: those of images whose features are all stored."""
    loader = joined(uri, staging)
    planned = [plan_of(3), plan_of(), plan_of(41, 40), plan_of(), plan_of(42), plan_of(39)]
    found = list(loader.batches(planned))
    assert [batch.ids.tolist() for batch in found] == [plan.ids.tolist() for plan in planned]
    assert [batch.labels.tolist() for batch in found] == [[3], [], [1, 0], [], [2], [9]]
    assert torch.equal(torch.cat([found[2].images.flip(0), found[4].images]), validation_pixels([0, 1, 2]))


# Cached features.


@pytest.fixture(scope="module")
def base():
    return CountingBase(models.build("resnet50v2").base, torch.float32)


def gather(source, batches):
    return [(batch.ids, source(batch)) for batch in batches]


@pytest.mark.parametrize("place", ["disk", "device"])
def test_cached_features_of_validation_and_of_train_are_their_own(uri, staging, base, tmp_path, place):
    """The first row of either split has the same number there, and another image."""
    images = open_images(uri, staging, train_images=10, flips="none", model="resnet50v2", image_size=96)
    plain = Features(images.loader, base)

    def every(source) -> list:
        plans = [*eval_plans(images.validation_ids, 8, 0, 1), *eval_plans(images.train_ids, 8, 0, 1)]
        return gather(source, source.batches(plans))

    def opened() -> Any:
        if place == "device":
            ids = images.train_ids, images.validation_ids
            return DeviceFeatures(images.loader, base, *ids, num_variants=1, num_at_once=5)
        path = tmp_path / "features-0.bin"
        return Features(images.loader, base, FeatureCache(path, images.loader.num_images, 1, base, 3, 0))

    expected, cached = every(plain), opened()
    for again in range(3):
        if again == 2 and place == "disk":
            cached = opened()  # another process, or a later run
        base.num_images = 0
        for (ids, features), (others, exact) in zip(every(cached), expected, strict=True):
            assert ids.tolist() == others.tolist()
            assert torch.allclose(features, exact, rtol=1e-4, atol=1e-4)
        assert (base.num_images > 0) == (again == 0)
    if place == "device":
        assert len(cached.features) == 10 + NUM_VALIDATION


def test_a_frozen_base_has_a_cache_of_both_splits(uri, tmp_path):
    settings = {"model": "resnet50v2", "image_size": 96, "features": "cached", "input_range": "-1..1"}
    images, said = open_images(uri, tmp_path, **settings), []
    state = SimpleNamespace(
        config=images.config,
        model=models.build("resnet50v2"),
        precision=Precision("fp32", CPU),
        world=1,
        compiles=False,
    )
    split_base(state, images, SimpleNamespace(say=said.append))
    cache = images.reader.cache
    assert len(cache.checks) == (NUM_TRAIN + NUM_VALIDATION) * 4
    (batch,) = images.validation_batches()
    state.input_of(batch)
    assert np.flatnonzero(cache.checks).tolist() == [4 * i for i in images.validation_ids]
    assert said[0].startswith("cached features: ")


# The plan.


def plan_with(uri: str, folder: Path, **settings: Any) -> Any:
    launch = Launch(recipe="deck_fan", data=uri, storage=str(folder / "runs"), name="run")
    return make_plan(config_of(**settings), launch)


def test_train_images_may_be_all_of_train(uri, tmp_path):
    assert plan_with(uri, tmp_path, train_images=NUM_TRAIN)
    with pytest.raises(UserError) as error:
        plan_with(uri, tmp_path, train_images=NUM_TRAIN + 1)
    assert str(error.value) == "--train-images is 41, the data set has 40 train images"


def test_classes_of_one_train_image_can_train_where_none_is_held_out(uri):
    manifest = read_manifest(uri)
    one = {**manifest.splits["train"], "num_rows": 10, "num_rows_per_class": [1] * 10}
    few = dataclasses.replace(manifest, splits={**manifest.splits, "train": one})
    assert [len(ids) for ids in split_ids(config_of(), few, np.arange(10))] == [10, NUM_VALIDATION]


def test_a_validation_split_without_images_is_refused(tmp_path):
    copy = tmp_path / "data"
    own_validation(copy, labels=[0])
    keep_rows(copy, "validation", np.arange(0))
    with pytest.raises(UserError, match=f"the validation split of {copy} has no images; prepare"):
        plan_with(str(copy), tmp_path)


def test_several_sizes_in_either_split_cannot_be_kept_decoded(tmp_path):
    uri = own_validation(tmp_path / "data", sizes=(20, 32))
    assert decoded_splits(plan_with(uri, tmp_path).config, read_manifest(uri)) == ["train"]
    with pytest.raises(UserError, match="--cache decoded needs images of one size"):
        plan_with(uri, tmp_path, cache="decoded")


@pytest.mark.parametrize(
    ("given", "settings", "named"),
    [
        ({"validation_fraction": 0.2, "epochs": 1}, {}, "--validation-fraction will"),
        ({"validation_fraction": 0.2, "split_seed": 1}, {}, "--validation-fraction and --split-seed will"),
        ({"split_seed": 1}, {}, "--split-seed will"),
        ({"split_seed": 1}, {"train_images": 20}, ""),  # it draws them
        ({"epochs": 1}, {}, ""),
    ],
)
def test_settings_without_effect_are_named(uri, shapes_uri, tmp_path, given, settings, named):
    source = "the validation images are the data set's own split (20 images)"
    found = ineffective_settings(given, plan_with(uri, tmp_path, **settings))
    assert found == (f"{named} have no effect: {source}" if named else None)
    assert ineffective_settings(given, plan_with(shapes_uri, tmp_path, **settings)) is None


def test_the_run_card_says_where_validation_images_come_from(uri, shapes_uri, tmp_path):
    said = [plan_with(u, tmp_path).card["chosen_where_the_deck_is_silent"] for u in (uri, shapes_uri)]
    assert [card["validation split"] for card in said] == [
        *("the data set's own", "10% of each class of train, drawn with seed 0")
    ]
    assert said[1] == choices(config_of())


def test_the_worker_says_where_validation_images_come_from(uri, staging, tmp_path):
    images, said = open_images(uri, staging), []
    state = SimpleNamespace(world=1, num_threads=1, device=CPU, precision=Precision("fp32", CPU))
    reporter = SimpleNamespace(state=state, say=said.append, warn=said.append)
    announce(reporter, plan_with(uri, tmp_path), images, is_resumed=False)
    assert said[0].startswith(f"training fan on {NUM_TRAIN} images, validating on {NUM_VALIDATION}: ")
    assert said[1] == "validation images: the data set's own split (20 images)"


# Preflight.


def test_staging_takes_both_splits(uri, tmp_path):
    """Held against the files that training really leaves behind."""
    manifest, folder = read_manifest(uri), Path(uri)
    sizes = {split: (folder / f"{split}-00000.parquet").stat().st_size for split in SPLITS}
    both, pixels = sizes["train"] + sizes["validation"], (NUM_TRAIN + NUM_VALIDATION) * 32 * 32 * 3
    assert num_bytes_to_stage(manifest, SPLITS[:2], []) == both + sizes["train"]
    assert num_bytes_to_stage(manifest, SPLITS[:2], SPLITS[:2]) == both + sizes["train"] + pixels
    assert num_bytes_to_stage(manifest, ["validation"], SPLITS[:2]) == 2 * sizes["validation"] + 20 * 32 * 32 * 3
    assert num_bytes_to_stage(manifest, [], SPLITS[:2]) == 0
    open_images(uri, tmp_path, cache="decoded")
    used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert pixels + sizes["train"] < used < num_bytes_to_stage(manifest, SPLITS[:2], SPLITS[:2])


def test_a_node_needs_room_for_the_split_that_it_has_not_staged(uri, tmp_path):
    manifest, data = read_manifest(uri), DataSet.open(uri, Staging(folder=tmp_path))
    needs = []
    for staged in ([], ["train"], ["train", "validation"]):
        for split in staged:
            data.stage(split)
        facts = gather_facts("node", str(tmp_path / "run"), uri, str(tmp_path), "token")
        assert facts["staged"] == staged
        needs.append(num_bytes_to_stage(manifest, SPLITS[len(staged) : 2], ["train"]))
        for free, status in ((needs[-1] - 1, "failed"), (needs[-1], "ok"))[not needs[-1] :]:
            seen = {**facts, "disk_free_bytes": free}
            options = {"token": "token", "decoded": ["train"], "use_gpu": False, "compiles": False, "written": []}
            (found,) = [finding for finding in assess([seen], manifest, **options) if finding.check == "disk"]
            assert found.status == status
    assert needs[0] > needs[1] > needs[2] == 0
    assert disk(facts, 0)[1].endswith("0 MiB needed")
