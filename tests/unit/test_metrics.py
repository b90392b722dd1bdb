"""What a run's figures mean: when a warning is given and what it says."""

import pytest

from cifar_dist.train.diagnosis import (
    average_warning,
    batch_warning,
    chance_warning,
    length_warning,
    validation_lags,
    validation_warning,
)

# Accuracy at chance.


def test_training_at_chance_says_what_to_look_at():
    message = chance_warning(0.11, 1000, 10)
    assert "training accuracy is 11.0%, chance is 10.0%" in message
    assert "learning rate" in message


@pytest.mark.parametrize(
    ("accuracy", "num_seen", "num_classes", "warned"),
    [
        *((0.5, 1000, 10, False), (0.5, 1000, 2, True)),
        # At 1000 images the standard error is sqrt(0.1 * 0.9 / 1000) = 0.0095, so the limit is 0.1285.
        *((0.128, 1000, 10, True), (0.129, 1000, 10, False)),
        *((0.12, 100, 10, True), (0.12, 10_000, 10, False)),  # more images make the warning stricter
        *((1.0, 8, 2, False), (0.9, 10, 2, False)),  # too few images to tell
    ],
)
def test_chance_is_within_three_standard_errors(accuracy, num_seen, num_classes, warned):
    assert (chance_warning(accuracy, num_seen, num_classes) is not None) is warned


# Validation that lags behind training.


@pytest.mark.parametrize(
    ("train", "validation", "num_classes", "lags"),
    [
        (0.51, 0.155, 10, True),  # the deck's
        *((0.51, 0.23, 10, True), (0.51, 0.24, 10, False)),  # a third of the gain of 0.41 is 0.137
        *((0.19, 0.1, 10, False), (0.21, 0.1, 10, True)),  # training must be at twice chance
        *((0.74, 0.5, 2, False), (0.76, 0.5, 2, True)),  # or halfway from chance to all
        *((0.98, 0.78, 10, False), (0.1, 0.1, 10, False), (0.3, 0.05, 10, True)),
    ],
)
def test_validation_lags_where_it_has_less_than_a_third_of_the_gain(train, validation, num_classes, lags):
    assert validation_lags(train, validation, num_classes) is lags


@pytest.mark.parametrize(("recalibrated", "batchnorm"), [(0.51, True), (0.28, True), (0.27, False), (0.16, False)])
def test_validation_warning_tells_batchnorm_from_other_causes(recalibrated, batchnorm):
    """The deck's case: 51% in training, 15.5% in validation, momentum 0.99."""
    message = validation_warning(0.51, 0.155, recalibrated, 10, 0.99)
    for part in ("is 15.5%, near chance (10.0%)", "training accuracy is 51.0%", f"reach {recalibrated:.1%}"):
        assert part in message
    assert ("moving statistics lag" in message) is ("momentum 0.99" in message) is batchnorm
    assert ("--recalibrate-batches" in message) is batchnorm
    assert ("it is not BatchNorm's moving statistics" in message) is ("overfitting" in message) is not batchnorm


# An average of the weights that lags.


@pytest.mark.parametrize(("plain", "lags"), [(0.51, True), (0.28, True), (0.27, False), (0.155, False)])
def test_average_warning_only_where_the_weights_themselves_are_better(plain, lags):
    """51% in training and 15.5% in validation: a third of the difference is 11.8 points."""
    message = average_warning(0.51, 0.155, plain, 0.99)
    assert (message is not None) is lags
    if message:
        assert "is 15.5% by the average of the weights, while training accuracy is 51.0%" in message
        assert f"The weights themselves reach {plain:.1%}" in message
        assert "(--ema-decay 0.99 looks back 100 steps), the network itself is sound" in message


# Steps of too few images.


@pytest.mark.parametrize(
    ("num_images", "batch", "world", "micro_batches", "fewest"),
    [
        *((1000, 32, 4, 1, None), (1000, 31, 4, 1, 7), (1000, 32, 5, 1, 6)),
        *((1000, 32, 2, 2, None), (1000, 32, 2, 3, 5), (1000, 8, 4, 100, 1)),
        *((20, 500, 4, 1, 5), (32, 500, 4, 1, None)),  # of fewer images than a batch
    ],
)
def test_batch_warning_says_how_few_images_batchnorm_has(num_images, batch, world, micro_batches, fewest):
    message = batch_warning(num_images, batch, world, micro_batches)
    assert (message is None) is (fewest is None)
    if message:
        assert f"each worker has only {fewest} images at a time" in message
        assert "raise --global-batch-size, or lower --workers or --accumulation-steps" in message


@pytest.mark.parametrize(("num_images", "warned"), [(129, True), (65, True), (128, False), (130, False)])
def test_batch_warning_of_a_last_step_of_one_image(num_images, warned):
    message = batch_warning(num_images, 64, 2, 1)
    assert (message is not None and "the last step of each epoch has a single image" in message) is warned
    assert message is None or "--global-batch-size or --train-images by one" in message


def test_length_warning_says_both_rates_and_both_numbers_of_epochs():
    message = length_warning(5, 10, 1950, 1e-5, 0.001)
    assert message.startswith("--epochs was 5 and is 10 now")
    assert "at step 1950 the rate jumps from 1e-05 to 0.001" in message
    assert "another --name" in message
    assert "--schedule constant" in message
