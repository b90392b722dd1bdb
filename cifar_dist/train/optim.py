"""Optimizer, learning-rate schedule (a pure function of the step) and the average of weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameters that take a gradient; frozen ones get no state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=True,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameters,
        config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The learning rate of step 0 <= step < num_steps.

    constant: the peak. cosine: to 0 along a half cosine. one-cycle: a triangle, up over `warmup_fraction` (0.3 if that
    is 0) and down to 0. All rise linearly over the first `warmup_fraction` of the steps.
    """
    fraction = 0.3 if config.schedule == "one-cycle" and not config.warmup_fraction else config.warmup_fraction
    warmup = round(fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    shape = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "one-cycle": 1 - done}
    return config.learning_rate * shape[config.schedule]


def set_step(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, num_steps: int) -> float:
    """Sets what depends on the step; returns the learning rate.

    Keras's Adam adds epsilon to sqrt(v) before the bias correction, torch after it: dividing epsilon by
    sqrt(1 - beta2^t) makes them equal.
    """
    rate = learning_rate(config, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if config.optimizer != "sgd":
            group["eps"] = config.epsilon / math.sqrt(1 - config.beta2 ** (step + 1))
    return rate


def average_of(model: nn.Module, config: OptimConfig) -> AveragedModel | None:
    """The exponential moving average of weights and buffers, or None if `ema_decay` is 0."""
    if not config.ema_decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
