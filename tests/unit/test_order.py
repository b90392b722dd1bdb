"""The order of samples and how they are augmented: pure, balanced, and the same for every world size."""

import subprocess
import sys

import numpy as np
import pytest

from cifar_dist.data import order

WORLDS = [1, 2, 3, 5, 8]
AUGMENTATION = order.ImageSpec(image_size=32, flips="both", crop_padding=4, cutout_size=8)


def splitmix64(*words: int) -> int:
    """The generator once more, in Python's own integers."""
    mask, state = 2**64 - 1, 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state


def test_draws_match_splitmix64_in_plain_integers():
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    expected = [splitmix64(order.FLIPS, 7, 3, i) for i in (0, 1, 59_999, 2**40)]
    assert order.draws(np.array([0, 1, 59_999, 2**40]), order.FLIPS, 7, 3).tolist() == expected


def test_streams_have_distinct_keys():
    streams = [order.ORDER, order.FLIPS, order.VALIDATION, order.SUBSET, order.TEST, order.STEP]
    streams += [order.CROP, order.CUTOUT]
    assert len({int(order.draws(0, stream, 1, 2)) for stream in streams}) == len(streams)


def test_order_and_augmentation_are_the_same_in_another_process():
    code = (
        "import numpy as np; from cifar_dist.data import order;"
        f"drawn = order.{AUGMENTATION}.draw(5, 2, np.arange(9));"
        "print(order.epoch_order(5, 2, 20).tolist(), [part.tolist() for part in drawn])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    drawn = [part.tolist() for part in AUGMENTATION.draw(5, 2, np.arange(9))]
    assert printed.strip() == f"{order.epoch_order(5, 2, 20).tolist()} {drawn}"


@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_epoch_order_is_a_permutation(n: int):
    drawn = order.epoch_order(0, 0, n)
    assert drawn.dtype == np.int64
    assert sorted(drawn.tolist()) == list(range(n))


def test_epoch_order_does_not_depend_on_how_many_keys_are_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch):
    whole = order.epoch_order(1, 2, 1000)
    monkeypatch.setattr(order, "CHUNK", 7)
    assert (order.epoch_order(1, 2, 1000) == whole).all()


def test_epochs_and_seeds_give_unrelated_orders():
    orders = [order.epoch_order(seed, epoch, 2000) for seed in (0, 1) for epoch in (0, 1, 2)]
    orders.append(np.arange(2000))
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)]
    assert np.abs(correlations).max() < 0.1  # 4.5 standard deviations of 1/sqrt(2000)


def test_every_sample_reaches_every_part_of_the_epoch():
    positions = np.array([np.argsort(order.epoch_order(0, epoch, 100)) for epoch in range(400)])
    assert np.abs(positions.mean(0) - 49.5).max() < 7.5  # the mean of 400 uniform draws: 5 standard deviations
    assert (positions.min(0) < 10).all()
    assert (positions.max(0) >= 90).all()


def test_flips_are_balanced_and_independent():
    drawn = order.flips(3, 0, np.arange(10_000))
    assert drawn.shape == (10_000, 2)
    assert drawn.dtype == bool
    combinations = np.bincount(drawn @ [1, 2], minlength=4) / 10_000
    assert np.abs(combinations - 0.25).max() < 0.02


def test_flips_change_with_epoch_and_seed():
    ids = np.arange(10_000)
    base = order.flips(0, 0, ids)
    for other in (order.flips(0, 1, ids), order.flips(1, 0, ids)):
        assert np.abs((base == other).mean(0) - 0.5).max() < 0.02


def test_flips_belong_to_the_sample_not_to_the_batch():
    every = order.flips(3, 1, np.arange(500))
    ids = np.array([499, 3, 77, 3])
    assert (order.flips(3, 1, ids) == every[ids]).all()


def test_flips_do_not_follow_the_order():
    first_half = order.epoch_order(0, 0, 10_000)[:5000]
    assert np.abs(order.flips(0, 0, first_half).mean(0) - 0.5).max() < 0.03


@pytest.mark.parametrize(("part", "low", "high"), [("crop", -4, 4), ("hole", -4, 27)])
def test_crops_and_holes_are_uniform_in_their_range(part: str, low: int, high: int):
    """A hole of 8 has its centre, 4 from its corner, in any of the 32 pixels."""
    drawn = getattr(AUGMENTATION.draw(3, 0, np.arange(20_000)), part)
    assert (drawn.dtype, drawn.shape) == (np.int32, (20_000, 2))
    for axis in (0, 1):
        shares = np.bincount(drawn[:, axis] - low) / 20_000
        assert len(shares) == high - low + 1
        assert np.abs(shares * len(shares) - 1).max() < 0.2  # 5 standard deviations where there are 32


def test_all_that_is_drawn_is_independent():
    drawn, ids = [AUGMENTATION.draw(3, epoch, np.arange(20_000)) for epoch in (0, 1)], np.arange(20_000)
    columns = np.concatenate([part for augment in drawn for part in augment] + [ids[:, None]], axis=1)
    correlations = np.corrcoef(columns.T)[np.triu_indices(13, 1)]
    assert np.abs(correlations).max() < 0.03  # 4 standard deviations


def test_augmentation_belongs_to_seed_epoch_and_sample():
    every, ids = AUGMENTATION.draw(3, 1, np.arange(500)), np.array([499, 3, 77, 3])
    for part, expected in zip(AUGMENTATION.draw(3, 1, ids), every, strict=True):
        assert (part == expected[ids]).all()
    for seed, epoch in ((4, 1), (3, 2)):
        for part, other in zip(AUGMENTATION.draw(seed, epoch, np.arange(500)), every, strict=True):
            assert (part == other).all(axis=1).mean() < 0.35  # of flips a quarter is expected


@pytest.mark.parametrize("flips", ["none", "horizontal", "both"])
def test_only_what_is_asked_for_is_drawn(flips: str):
    ids, nothing = np.arange(100), order.no_augment(100, 32)
    assert (nothing.flips.any(), nothing.crop.any(), nothing.hole.min()) == (False, False, 32)
    drawn, every = order.ImageSpec(image_size=32, flips=flips).draw(3, 1, ids), order.flips(3, 1, ids)
    allowed = {"none": [0, 0], "horizontal": [1, 0], "both": [1, 1]}[flips]
    assert (drawn.flips == every * np.array(allowed, bool)).all()
    assert (drawn.crop == nothing.crop).all()
    assert (drawn.hole == nothing.hole).all()


def test_step_seeds_differ_and_fit_torch():
    seeds = {order.step_seed(s, e, t, r) for s in range(4) for e in range(4) for t in range(4) for r in range(4)}
    assert len(seeds) == 4**4
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(("n", "batch", "steps"), [(100, 10, 10), (101, 10, 11), (9, 10, 1), (10, 10, 1), (1, 1, 1)])
def test_num_steps_counts_the_smaller_last_step(n: int, batch: int, steps: int):
    assert order.num_steps(n, batch) == steps


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("n", "batch"), [(103, 10), (100, 32), (7, 16), (1, 4)])
def test_rank_parts_tile_each_global_step(n: int, batch: int, world: int):
    covered = []
    for step in range(order.num_steps(n, batch)):
        parts = [order.rank_part(step, n, batch, rank, world) for rank in range(world)]
        size = min(batch, n - step * batch)
        assert {part.size for part in parts} == {size}
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= min(size, 2)  # one image alone has no variance
        counted = [part for part in parts if part.counts]
        assert len(counted) == min(world, max(1, size // 2))
        assert all(part[:2] in [other[:2] for other in counted] for part in parts)
        positions = [p for part in counted for p in range(part.start, part.stop)]
        assert positions == list(range(step * batch, step * batch + size))
        covered += positions
    assert covered == list(range(n))


def test_stratified_split_takes_the_share_of_each_class():
    labels = np.repeat([0, 1, 2], [200, 100, 10])
    rest, drawn = order.stratified_split(labels, 0.2, (order.TEST, 0))
    assert np.bincount(labels[drawn]).tolist() == [40, 20, 2]
    assert sorted([*rest, *drawn]) == list(range(310))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(drawn) > 0).all()


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_stratified_split_leaves_small_classes_on_both_sides(fraction: float):
    labels = np.array([0, 1, 0, 1, 2])
    rest, drawn = order.stratified_split(labels, fraction, (order.TEST, 0))
    assert np.bincount(labels[rest], minlength=3).tolist() == [1, 1, 1]
    assert np.bincount(labels[drawn], minlength=3).tolist() == [1, 1, 0]  # one image alone stays in the rest


def test_split_is_drawn_and_depends_on_the_seed():
    labels = np.zeros(100, np.int64)
    draws = [order.stratified_split(labels, 0.3, (order.TEST, seed))[1].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != list(range(30))


def test_validation_is_drawn_with_its_own_stream():
    labels = np.zeros(100, np.int64)
    _, validation = order.train_validation_ids(labels, 0.3, 0, seed=0)
    assert validation.tolist() != order.stratified_split(labels, 0.3, (order.TEST, 0))[1].tolist()


def test_train_images_keeps_classes_even_and_the_validation_split():
    labels = np.random.default_rng(0).integers(0, 5, 400)
    every, validation = order.train_validation_ids(labels, 0.1, 0, seed=1)
    some, same_validation = order.train_validation_ids(labels, 0.1, 52, seed=1)
    assert (validation == same_validation).all()
    assert sorted([*every, *validation]) == list(range(400))
    assert len(some) == 52
    assert set(some) < set(every)
    assert (np.diff(some) > 0).all()
    counts = np.bincount(labels[some])
    assert counts.max() - counts.min() <= 1
    other, _ = order.train_validation_ids(labels, 0.1, 52, seed=2)
    assert some.tolist() != other.tolist()


def test_more_train_images_than_there_are_keeps_all():
    labels = np.arange(40) % 4
    every, _ = order.train_validation_ids(labels, 0.2, 0, seed=0)
    assert len(every) == 32
    for train_images in (32, 33):
        assert (order.train_validation_ids(labels, 0.2, train_images, seed=0)[0] == every).all()
