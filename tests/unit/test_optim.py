"""Optimizers against their definitions in numpy, schedules as pure functions, the average of weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import OptimConfig
from cifar_dist.train.optim import average_of, learning_rate, make_optimizer, set_step

NUM_STEPS = 8


def gradients() -> np.ndarray:
    """[NUM_STEPS, 6], from 1e-8 to 1: where they are as small as epsilon, its place in Adam shows."""
    scale = np.array([1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0])
    return np.random.default_rng(0).normal(size=(NUM_STEPS, 6)) * scale


def trained(config: OptimConfig) -> np.ndarray:
    """The weights (float64 [6], from 1) after NUM_STEPS steps of the product's optimizer."""
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(model, config)
    for step, gradient in enumerate(gradients()):
        set_step(optimizer, config, step, NUM_STEPS)
        model.weight.grad = torch.from_numpy(gradient).view(1, 6)
        optimizer.step()
    return model.weight.detach().numpy()[0]


def keras_adam(rate: float, beta1: float, beta2: float, epsilon: float, decoupled_decay: float = 0.0) -> np.ndarray:
    """Adam as Keras's update_step has it: epsilon beside sqrt(v), the bias correction in the rate."""
    weights, m, v = np.ones(6), np.zeros(6), np.zeros(6)
    for step, gradient in enumerate(gradients()):
        weights = weights - rate * decoupled_decay * weights
        m += (gradient - m) * (1 - beta1)
        v += (gradient**2 - v) * (1 - beta2)
        alpha = rate * np.sqrt(1 - beta2 ** (step + 1)) / (1 - beta1 ** (step + 1))
        weights = weights - alpha * m / (np.sqrt(v) + epsilon)
    return weights


def test_adam_is_keras_s():
    found, expected = trained(OptimConfig()), keras_adam(1e-3, 0.9, 0.999, 1e-7)
    np.testing.assert_allclose(found - 1, expected - 1, rtol=1e-9)


def test_adam_takes_its_settings():
    config = OptimConfig(learning_rate=0.02, beta1=0.5, beta2=0.8, epsilon=1e-5)
    np.testing.assert_allclose(trained(config) - 1, keras_adam(0.02, 0.5, 0.8, 1e-5) - 1, rtol=1e-9)


def test_the_epsilon_rule_matters():
    """torch's own rule differs by far more than the tolerance of the test above."""
    weights = torch.ones(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], 1e-3, eps=1e-7)
    for gradient in gradients():
        weights.grad = torch.from_numpy(gradient)
        optimizer.step()
    moved, expected = weights.detach().numpy() - 1, keras_adam(1e-3, 0.9, 0.999, 1e-7) - 1
    assert abs(moved[0] / expected[0]) > 2


def test_adamw_decays_apart_from_the_gradient():
    config = OptimConfig(optimizer="adamw", weight_decay=0.1, learning_rate=0.01)
    expected = keras_adam(0.01, 0.9, 0.999, 1e-7, decoupled_decay=0.1)
    np.testing.assert_allclose(trained(config) - 1, expected - 1, rtol=1e-9)


def test_sgd_has_nesterov_momentum_and_decay():
    config = OptimConfig(optimizer="sgd", learning_rate=0.1, momentum=0.8, weight_decay=0.01)
    weights, velocity = np.ones(6), np.zeros(6)
    for gradient in gradients():
        gradient = gradient + 0.01 * weights
        velocity = 0.8 * velocity + gradient
        weights = weights - 0.1 * (gradient + 0.8 * velocity)
    np.testing.assert_allclose(trained(config), weights, rtol=1e-12)


def test_sgd_without_momentum():
    config = OptimConfig(optimizer="sgd", learning_rate=0.1, momentum=0.0)
    np.testing.assert_allclose(trained(config), 1 - 0.1 * gradients().sum(0), rtol=1e-12)


def test_the_schedule_reaches_the_optimizer():
    config = OptimConfig(optimizer="sgd", learning_rate=0.1, momentum=0.0, schedule="cosine")
    rates = np.array([learning_rate(config, step, NUM_STEPS) for step in range(NUM_STEPS)])
    np.testing.assert_allclose(trained(config), 1 - (rates[:, None] * gradients()).sum(0), rtol=1e-12)


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    given = [id(p) for group in make_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert given == [id(p) for p in model[1].parameters()]


# Schedules.


def rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(learning_rate=2.0, **settings)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_constant_is_the_peak():
    assert rates(5) == [2.0] * 5


def test_constant_with_warmup_rises_to_the_peak():
    assert rates(10, warmup_fraction=0.4) == pytest.approx([0.5, 1.0, 1.5] + [2.0] * 7)


def test_cosine():
    expected = [2 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)]
    found = rates(8, schedule="cosine")
    assert found == pytest.approx(expected)
    assert (found[0], found[4]) == pytest.approx((2.0, 1.0))


def test_cosine_with_warmup():
    expected = [1.0, 2.0] + [1 + math.cos(math.pi * s / 8) for s in range(8)]
    assert rates(10, schedule="cosine", warmup_fraction=0.2) == pytest.approx(expected)


@pytest.mark.parametrize(("fraction", "warmup"), [(0.0, 3), (0.5, 5)])
def test_one_cycle_is_a_triangle(fraction, warmup):
    found = rates(10, schedule="one-cycle", warmup_fraction=fraction)
    rise = [2 * (s + 1) / warmup for s in range(warmup)]
    fall = [2 * (1 - s / (10 - warmup)) for s in range(10 - warmup)]
    assert found == pytest.approx(rise + fall)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_rates_stay_above_zero_and_reach_the_peak(schedule, num_steps):
    found = rates(num_steps, schedule=schedule)
    assert min(found) > 0
    assert max(found) == pytest.approx(2.0)


def test_schedules_are_pure_functions_of_the_step():
    config = OptimConfig(schedule="one-cycle")
    forward = [learning_rate(config, s, 20) for s in range(20)]
    backward = [learning_rate(config, s, 20) for s in reversed(range(20))]
    assert forward == backward[::-1]


def test_set_step_does_not_depend_on_earlier_steps():
    """A resumed run starts with a fresh optimizer at its step: rate and epsilon must be those of the step."""
    config = OptimConfig(schedule="cosine")
    straight, jumped = (make_optimizer(nn.Linear(1, 1), config) for _ in range(2))
    returned = [set_step(straight, config, step, 10) for step in range(6)][-1]
    assert set_step(jumped, config, 5, 10) == returned == straight.param_groups[0]["lr"]
    assert jumped.param_groups[0]["eps"] == straight.param_groups[0]["eps"] == 1e-7 / math.sqrt(1 - 0.999**6)


# Average of weights.


def test_no_average_without_a_decay():
    assert average_of(nn.Linear(1, 1), OptimConfig()) is None


def test_average_follows_weights_and_buffers():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = average_of(model, OptimConfig(ema_decay=0.75))
    values = [1.0, 3.0, -2.0]
    for value in values:
        nn.init.constant_(model[0].weight, value)
        nn.init.constant_(model[1].running_mean, 10 * value)
        average.update_parameters(model)
    expected = values[0]
    for value in values[1:]:
        expected = 0.75 * expected + 0.25 * value
    assert average.module[0].weight.item() == pytest.approx(expected)
    assert average.module[1].running_mean.item() == pytest.approx(10 * expected)
    assert model[0].weight.item() == values[-1]  # the model itself is left alone
    assert int(average.n_averaged) == 3
