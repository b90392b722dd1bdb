"""Cached features: the same as computed ones, once per image and variant, whole whatever happens."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from counting_base import CountingBase

from cifar_dist import models
from cifar_dist.config import Config
from cifar_dist.data import order
from cifar_dist.data.loader import Loader
from cifar_dist.data.order import ImageSpec, eval_plans, train_plans
from cifar_dist.data.private import Staging
from cifar_dist.data.staged import DataSet
from cifar_dist.errors import UserError
from cifar_dist.models.frozen import FrozenBase
from cifar_dist.train.features import DeviceFeatures, FeatureCache, Features, cache_key, expected_bytes, open_cache

SIZE, IDS = 96, np.arange(0, 200, 10)


@pytest.fixture(scope="module")
def base():
    return CountingBase(models.build("resnet50v2").base, torch.float32)


@pytest.fixture(scope="module")
def loader(shapes_uri, tmp_path_factory):
    spec = ImageSpec(image_size=SIZE, input_range="-1..1", channels_last=True)
    folder = tmp_path_factory.mktemp("staged")
    data = DataSet.open(shapes_uri, Staging(folder=folder))
    return Loader(data, "train", spec, device=torch.device("cpu"), num_threads=1, max_batch_size=8)


def cache(folder, base, num_bytes=0):
    return FeatureCache(folder / "features-0.bin", 200, 4, base, 3, num_bytes)


def plans(epoch):
    return train_plans(
        IDS,
        order.ImageSpec(image_size=SIZE, flips="both"),
        seed=0,
        epoch=epoch,
        first_step=0,
        global_batch_size=8,
        rank=0,
        world=1,
    )


def gather(source, planned):
    return [(batch.ids, batch.labels, source(batch)) for batch in source.batches(planned)]


@pytest.mark.parametrize("place", ["disk", "device"])
def test_cached_features_are_the_computed_ones_each_computed_once(loader, base, tmp_path, place):
    computed = Features(loader, base)
    cached: Any = Features(loader, base, cache(tmp_path, base))
    if place == "device":
        cached = DeviceFeatures(loader, base, IDS[::-1], IDS[:0], num_variants=4, num_at_once=5)
    base.num_images, seen = 0, set()
    for epoch in range(4):
        expected = gather(computed, plans(epoch))
        base.num_images = 0
        found = gather(cached, plans(epoch))
        new = {
            (i, *flips) for p in plans(epoch) for i, flips in zip(p.ids.tolist(), p.augment.flips.tolist(), strict=True)
        } - seen
        assert base.num_images == len(new) or (place == "device" and base.num_images % 5 == 0 and new)
        seen |= new
        for (ids, labels, features), (ids_, labels_, features_) in zip(found, expected, strict=True):
            assert np.array_equal(ids, ids_)
            assert torch.equal(labels, labels_)
            assert torch.allclose(features, features_, rtol=1e-4, atol=1e-4)
    assert 0 < len(seen) < 80


def test_on_a_device_validation_takes_a_row_an_image_and_training_one_for_each_flip(loader, base):
    train_ids, validation_ids = IDS[3:], IDS[:3]
    kept = DeviceFeatures(loader, base, train_ids, validation_ids, num_variants=4, num_at_once=5)
    assert len(kept.features) == 4 * len(train_ids) + 3
    places = [*(kept.first_row[train_ids][:, None] + np.arange(4)).ravel(), *kept.first_row[validation_ids]]
    assert sorted(places) == list(range(len(kept.features)))
    planned = list(eval_plans(validation_ids, 8, 0, 1))
    for (_, _, features), (_, _, others) in zip(
        gather(kept, planned), gather(Features(loader, base), planned), strict=True
    ):
        assert torch.allclose(features, others, rtol=1e-4, atol=1e-4)


def test_another_process_finds_what_is_there(loader, base, tmp_path):
    planned = list(eval_plans(IDS, 8, 0, 1))
    expected = gather(Features(loader, base, cache(tmp_path, base)), planned)
    base.num_images = 0
    found = gather(Features(loader, base, cache(tmp_path, base)), planned)
    assert base.num_images == 0
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, expected, strict=True))


def test_a_spoiled_row_is_computed_again(loader, base, tmp_path):
    planned = list(eval_plans(IDS, 8, 0, 1))
    source = Features(loader, base, cache(tmp_path, base))
    expected = gather(source, planned)
    row = source.cache.row_bytes
    with open(source.cache.path, "r+b") as file:
        file.seek(int(IDS[3]) * 4 * row + 100)
        file.write(b"\xff\xff\xff\xff")
    base.num_images = 0
    found = gather(Features(loader, base, cache(tmp_path, base)), planned)
    assert base.num_images == 1
    assert all(torch.allclose(a[2], b[2], rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))


def test_the_heads_gradient_is_that_of_computed_features(loader, base, tmp_path):
    head = models.frozen.Head(models.build("resnet50v2"))
    source = Features(loader, base, cache(tmp_path, base))
    gather(source, plans(0))
    gradients = []
    for way in (Features(loader, base), source):
        batch = next(iter(way.batches(plans(0))))
        head.zero_grad()
        torch.manual_seed(0)  # of dropout
        head(way(batch)).sum().backward()
        gradients.append(head.conv.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().max().item())


def test_no_room_is_said_before_anything_is_computed(base, tmp_path):
    with pytest.raises(UserError, match=r"need 1048576\.0 GiB .* GiB free; set --staging-folder"):
        cache(tmp_path, base, num_bytes=1 << 50)


def test_the_key_tells_weights_and_settings_apart(base):
    other = FrozenBase(models.build("resnet50v2", seed=1).base, torch.float32)
    keys = [cache_key(base, 96, "-1..1", 4), cache_key(base, 96, "0..1", 4), cache_key(other, 96, "-1..1", 4)]
    keys.append(cache_key(FrozenBase(models.build("resnet50v2").base, torch.bfloat16), 96, "-1..1", 4))
    assert len(set(keys)) == 4
    assert cache_key(base, 96, "-1..1", 4) == keys[0]


def test_no_run_finds_the_features_of_another_resize(shapes_uri, base, tmp_path):
    data = DataSet.open(shapes_uri, Staging(folder=tmp_path))
    config = Config().replace(model="resnet50v2", image_size=96, features="cached")
    changes = ({}, {"resize": "fit"}, {"resize": "crop"}, {"antialias": True})
    paths = {
        open_cache(config.replace(**change), data, base, num_images=200, num_used=(180, 20)).path for change in changes
    }
    assert len(paths) == len(changes)


def test_expected_bytes_are_what_the_flips_bring():
    n, epochs = 5000, 3
    seen = {(i, *f) for e in range(epochs) for i, f in enumerate(order.flips(0, e, np.arange(n)).tolist())}
    row = 7 * 7 * 2048 * 4
    assert expected_bytes(n, 100, 4, epochs, 224) == pytest.approx((len(seen) + 100) * row, rel=0.01)
    assert expected_bytes(n, 0, 1, epochs, 224) == n * row


def test_the_notice_names_disk_and_memory(shapes_uri, base, tmp_path):
    config = Config().replace(model="resnet50v2", image_size=96, flips="both", features="cached", epochs=3)
    opened = open_cache(
        config, DataSet.open(shapes_uri, Staging(folder=tmp_path)), base, num_images=200, num_used=(180, 20)
    )
    most = 200 * 4 * math.ceil(96 / 32) ** 2 * 2048 * 4
    assert f"at most {most / 2**30:.2f} GiB" in opened.notice
    assert "in memory" in opened.notice
    assert opened.path.stat().st_size == most
    assert opened.path.stat().st_blocks == 0  # sparse: nothing is there yet


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "fan"},
        {"model": "resnet50v2", "image_size": 96, "finetune": True},
        {"model": "resnet50v2", "image_size": 96, "crop_padding": 4},
        {"model": "resnet50v2", "image_size": 96, "cutout_size": 4},
        {"model": "resnet50v2", "image_size": 96, "synthetic_data": True},
    ],
)
def test_settings_that_make_no_sense_with_it_are_refused(settings):
    with pytest.raises(UserError, match="--features cached"):
        Config().replace(features="cached", **settings)
