"""Optimizers, learning-rate schedule (a pure function of the step) and the average of weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import OptimConfig


class Muon(torch.optim.Muon):
    """torch's Muon over convolution kernels [out, in, h, w], each as the matrix [out, in * h * w].

    torch.optim.Muon takes only matrices, so this class gives it copies of the kernels. The column order of a copy
    does not depend on the kernel's memory format.
    """

    def __init__(self, kernels: list[nn.Parameter], config: OptimConfig) -> None:
        self.kernels = kernels
        matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
        super().__init__(
            matrices, config.muon_learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def take_gradients(self) -> None:
        """Copies kernels and gradients into the matrices; call it after each backward pass."""
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            matrix.data.copy_(kernel.detach().flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1).clone()

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            kernel.data.copy_(matrix.data.view(kernel.shape))


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the parameters that take a gradient. Frozen parameters get no optimizer state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        groups, nesterov = decayed(parameters, config), config.momentum > 0
        return [torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)]
    adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.epsilon, "fused": True}
    if config.optimizer == "adam":
        return [torch.optim.Adam(decayed(parameters, config), config.learning_rate, **adam)]
    kernels = [p for p in parameters if config.optimizer == "muon" and p.ndim == 4]
    others = [p for p in parameters if not any(p is kernel for kernel in kernels)]
    adamw = torch.optim.AdamW(decayed(others, config), config.learning_rate, **adam)
    return [Muon(kernels, config), adamw] if kernels else [adamw]


def decayed(parameters: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Returns parameter groups with their weight decay.

    Biases and BatchNorm's scales, which have one dimension, get no decay unless `decay_bias_and_norm` is set."""
    if config.decay_bias_and_norm:
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule_factor(config: OptimConfig, step: int, num_steps: int) -> float:
    """Returns the learning rate at step 0 <= step < num_steps, as a fraction of its peak.

    All schedules rise linearly over the first `warmup_fraction` of the steps. Then constant stays at the peak, cosine
    falls to 0 along a half cosine, and one-cycle falls to 0 linearly. A `warmup_fraction` of 0 means 0.3 in one-cycle.
    """
    fraction = 0.3 if config.schedule == "one-cycle" and not config.warmup_fraction else config.warmup_fraction
    warmup = round(fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    shape = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "one-cycle": 1 - done}
    return shape[config.schedule]


def set_step(optimizers: list[torch.optim.Optimizer], config: OptimConfig, step: int, num_steps: int) -> float:
    """Sets the learning rates and Adam's epsilon for the step. Returns the learning rate.

    With muon it returns the learning rate of the AdamW parameters. Keras's Adam adds epsilon to sqrt(v) before the
    bias correction, torch's Adam after it. Dividing epsilon by sqrt(1 - beta2^t) makes them equal.
    """
    factor = schedule_factor(config, step, num_steps)
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            group["lr"] = factor * (config.muon_learning_rate if muon else config.learning_rate)
            if config.optimizer != "sgd" and not muon:
                group["eps"] = config.epsilon / math.sqrt(1 - config.beta2 ** (step + 1))
    return factor * config.learning_rate


def average_of(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    """Returns the exponential moving average of weights and buffers, or None if `ema_decay` is 0.

    The decay warms up: after n steps it is at most (1 + n) / (10 + n), as in timm and TensorFlow. Otherwise the
    average of a short run would consist mostly of its random initial weights.
    """
    if not config.ema_decay:
        return None

    def update(averages: Any, values: Any, num_averaged: Any) -> None:
        n = int(average.n_averaged)  # n_averaged is on the CPU; reading num_averaged could wait for the GPU
        get_ema_multi_avg_fn(min(config.ema_decay, (1 + n) / (10 + n)))(averages, values, num_averaged)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average
