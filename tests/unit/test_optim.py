"""Optimizers against their definitions in numpy, schedules as pure functions, the average of weights."""

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cifar_dist.config import OptimConfig
from cifar_dist.train.optim import (
    KerasAdam,
    Muon,
    average_of,
    load_optimizer,
    make_optimizers,
    schedule_factor,
    set_step,
)

NUM_STEPS = 8


def gradients() -> np.ndarray:
    """[NUM_STEPS, 6], from 1e-8 to 1: where they are as small as epsilon, its place in Adam shows."""
    scale = np.array([1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0])
    return np.random.default_rng(0).normal(size=(NUM_STEPS, 6)) * scale


def trained(config: OptimConfig) -> np.ndarray:
    """The weights (float64 [6], from 1) after NUM_STEPS steps of the product's optimizer."""
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    (optimizer,) = make_optimizers(model, config)
    for step, gradient in enumerate(gradients()):
        set_step([optimizer], config, step, NUM_STEPS)
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
    rates = np.array([0.1 * schedule_factor(config, step, NUM_STEPS) for step in range(NUM_STEPS)])
    np.testing.assert_allclose(trained(config), 1 - (rates[:, None] * gradients()).sum(0), rtol=1e-12)


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (optimizer,) = make_optimizers(model, OptimConfig())
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert given == [id(p) for p in model[1].parameters()]


# Muon.

MUON = OptimConfig(optimizer="muon", schedule="cosine", muon_learning_rate=0.05, momentum=0.8, weight_decay=0.2)


def conv_model(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    """Two convolutions, one [8, 3 * 9] and one [16, 8 * 1], a BatchNorm and a Linear."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(*layers).to(memory_format=memory_format)


def muon_steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    """Steps with gradients that are drawn by step and parameter, in the parameters' memory format."""
    for step in steps:
        set_step(optimizers, MUON, step, NUM_STEPS)
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(100 * step + len(name) * p.ndim)
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator)) if p.requires_grad else None
        for optimizer in optimizers:
            if isinstance(optimizer, Muon):
                optimizer.take_gradients()
            optimizer.step()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("frozen", [(), (0,), (0, 2)])
def test_muon_takes_convolution_kernels_and_adamw_the_rest(frozen):
    """All that takes a gradient once, and nothing else: frozen parameters get no state and do not move."""
    model = conv_model()
    for i in frozen:
        model[i].requires_grad_(False)
    before, optimizers = copy.deepcopy(model), make_optimizers(model, MUON)
    assert [type(o) for o in optimizers] == [Muon, KerasAdam][len(frozen) == 2 :]
    kernels = [model[i].weight for i in (0, 2) if i not in frozen]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 4]
    assert [id(p) for p in optimizers[-1].param_groups[0]["params"]] == [id(p) for p in others]
    assert [id(p) for muon in optimizers[:-1] for p in muon.kernels] == [id(p) for p in kernels]
    muon_steps(model, optimizers, range(2))
    assert [len(o.state) for o in optimizers] == [n for n in (len(kernels), len(others)) if n]
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) is not p.requires_grad


def test_muon_is_torch_s_on_the_flattened_kernels():
    model = conv_model()
    matrices = [nn.Parameter(model[i].weight.detach().flatten(1).clone()) for i in (0, 2)]
    before = copy.deepcopy(matrices)
    torch_s = torch.optim.Muon(matrices, momentum=0.8, weight_decay=0.2)
    optimizers = make_optimizers(model, MUON)
    for step in range(NUM_STEPS - 1):
        muon_steps(model, optimizers, range(step, step + 1))
        for i, matrix in zip((0, 2), matrices, strict=True):
            matrix.grad = model[i].weight.grad.flatten(1)
        torch_s.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
        torch_s.step()
    for i, matrix, old in zip((0, 2), matrices, before, strict=True):
        assert torch.equal(model[i].weight.flatten(1), matrix)
        assert not torch.equal(matrix, old)


def test_muon_s_result_does_not_depend_on_the_memory_format():
    nchw, nhwc = conv_model(), conv_model(torch.channels_last)
    for model in (nchw, nhwc):
        muon_steps(model, make_optimizers(model, MUON), range(4))
    assert not nhwc[0].weight.is_contiguous()
    assert nhwc[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert same_weights(nchw, nhwc)


@pytest.mark.parametrize("restored", [True, False])
def test_muon_continues_from_its_stored_state(restored):
    """As a resumed worker does: optimizers, then weights, then their state; without that it goes elsewhere."""
    straight, continued = conv_model(), conv_model()
    optimizers = make_optimizers(straight, MUON)
    muon_steps(straight, optimizers, range(3))
    fresh, stored = make_optimizers(continued, MUON), io.BytesIO()
    continued.load_state_dict(straight.state_dict())
    torch.save([optimizer.state_dict() for optimizer in optimizers], stored)
    muon_steps(straight, optimizers, range(3, 6))
    stored.seek(0)
    for optimizer, state in zip(fresh, torch.load(stored, weights_only=True), strict=True):
        if restored:
            optimizer.load_state_dict(state)
    muon_steps(continued, fresh, range(3, 6))
    assert same_weights(continued, straight) is restored


def test_the_schedule_moves_both_rates_of_muon():
    optimizers = make_optimizers(conv_model(), MUON)
    for step in (0, 4, 7):
        factor = (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
        assert set_step(optimizers, MUON, step, NUM_STEPS) == pytest.approx(1e-3 * factor)
        correction = math.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
        rates = [o.param_groups[0]["lr"] for o in optimizers]
        assert rates == pytest.approx([0.05 * factor, 1e-3 * factor * correction])
        assert optimizers[1].param_groups[0]["rate"] == pytest.approx(1e-3 * factor)


# Schedules.


def rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(**settings)
    return [2.0 * schedule_factor(config, step, num_steps) for step in range(num_steps)]


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
    forward = [schedule_factor(config, s, 20) for s in range(20)]
    backward = [schedule_factor(config, s, 20) for s in reversed(range(20))]
    assert forward == backward[::-1]


def test_set_step_does_not_depend_on_earlier_steps():
    """A resumed run starts with a fresh optimizer at its step: the rate must be that of the step."""
    config = OptimConfig(schedule="cosine")
    (straight,), (jumped,) = (make_optimizers(nn.Linear(1, 1), config) for _ in range(2))
    returned = [set_step([straight], config, step, 10) for step in range(6)][-1]
    assert set_step([jumped], config, 5, 10) == returned == straight.param_groups[0]["rate"]
    assert jumped.param_groups[0]["lr"] == straight.param_groups[0]["lr"] != returned


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_a_state_of_an_earlier_version_goes_on_with_the_rule_of_keras(name, kind):
    """It is torch's own, with the true number of steps, an epsilon of its own, and other settings."""
    config = OptimConfig(optimizer=name, weight_decay=0.1, learning_rate=0.01)
    model = nn.Linear(6, 1)
    (straight,) = make_optimizers(model, config)
    for step in range(3):
        set_step([straight], config, step, NUM_STEPS)
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
        straight.step()
    other = copy.deepcopy(model)
    (resumed,) = make_optimizers(other, config)
    old = kind(other.parameters(), 0.01, eps=3.2e-6, weight_decay=0.1, fused=True)
    for parameter, moments in zip(other.parameters(), straight.state.values(), strict=True):
        old.state[parameter] = {**moments, "step": torch.tensor(3.0)}
    load_optimizer(resumed, copy.deepcopy(old.state_dict()))
    for step in range(3, 6):
        for optimizer, network in ((straight, model), (resumed, other)):
            set_step([optimizer], config, step, NUM_STEPS)
            network.weight.grad, network.bias.grad = torch.ones_like(network.weight), torch.ones_like(network.bias)
            optimizer.step()
    assert same_weights(model, other)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_state_of_another_memory_format_goes_on_the_same(name):
    config, ends = OptimConfig(optimizer=name, learning_rate=0.01), []
    for formats in ((torch.contiguous_format,) * 2, (torch.channels_last, torch.contiguous_format)):
        state: Any = None
        torch.manual_seed(0)
        weights = nn.Conv2d(4, 5, 3).state_dict()
        for memory_format in formats:
            model = nn.Conv2d(4, 5, 3).to(memory_format=memory_format)
            model.load_state_dict(weights)
            (optimizer,) = make_optimizers(model, config)
            if state:
                load_optimizer(optimizer, state)
            for step in range(3):
                set_step([optimizer], config, step, NUM_STEPS)
                for parameter in model.parameters():
                    generator = torch.Generator().manual_seed(step)
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = torch.empty_like(parameter).copy_(drawn)
                optimizer.step()
            state, weights = copy.deepcopy(optimizer.state_dict()), model.state_dict()
        ends.append(weights["weight"])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


# Average of weights.


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("decay_bias_and_norm", [True, False])
def test_biases_and_norms_decay_only_if_they_shall(optimizer, decay_bias_and_norm):
    """With no gradient but the decay, what moves is what decays."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    nn.init.constant_(model[1].bias, 0.5)
    config = OptimConfig(
        optimizer=optimizer, learning_rate=0.1, weight_decay=0.1, decay_bias_and_norm=decay_bias_and_norm
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for made in make_optimizers(model, config):
        made.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = set(before) if decay_bias_and_norm else {"0.weight", "3.weight"}
    assert moved == expected - ({"0.weight"} if optimizer == "muon" else set())  # Muon keeps a kernel's norm instead


def test_no_average_without_a_decay():
    assert average_of(nn.Linear(1, 1), OptimConfig()) is None


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.75, 0.999])
def test_average_follows_weights_and_buffers(decay):
    """It warms up: after n steps no more than (1 + n) / (10 + n) of it is kept, or the random start would stay in it
    for 1 / (1 - decay) steps."""
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = average_of(model, OptimConfig(ema_decay=decay))
    values = [float(value) for value in np.random.default_rng(0).normal(size=40)]
    for value in values:
        nn.init.constant_(model[0].weight, value)
        nn.init.constant_(model[1].running_mean, 10 * value)
        average.set_step()
        average.update_parameters(model)
    expected = values[0]
    for n, value in enumerate(values[1:], 1):
        kept = min(decay, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * value
    assert average.module[0].weight.item() == pytest.approx(expected, rel=1e-4)
    assert average.module[1].running_mean.item() == pytest.approx(10 * expected, rel=1e-4)
    assert model[0].weight.item() == pytest.approx(values[-1])  # the model itself is left alone
    assert int(average.n_averaged) == 40
