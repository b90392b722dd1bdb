"""Optimizers, learning-rate schedule (a pure function of the step) and the average of weights."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from cifar_dist.config import OptimConfig

NO_CORRECTION = 2.0**30  # steps after which torch's bias corrections of Adam are 1; adding 1 to it changes nothing


def set_number(place: dict[str, Any], name: str, value: float, device: torch.device) -> None:
    """Sets a number that a step reads. On a GPU it is a tensor that keeps its address, so a CUDA graph reads it too."""
    if device.type != "cuda":
        place[name] = value
    elif isinstance(place.get(name), torch.Tensor) and place[name].device == device:
        place[name].fill_(value)
    else:
        place[name] = torch.full((), value, device=device)


class KerasAdam(torch.optim.Adam):
    """Adam as Keras computes it: epsilon is added to sqrt(v) before the bias correction, which torch's Adam adds after.

    The bias corrections are part of the learning rate, `set_step` puts them there. torch's own are switched off by a
    step count so large that they are 1. `decoupled`: the weight decay is AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, *, decoupled: bool) -> None:
        for group in groups:
            decay = group["weight_decay"]
            group |= {
                "decay": decay if decoupled else 0.0,
                "weight_decay": 0.0 if decoupled else decay,
                "rate": config.learning_rate,
            }
        on_gpu = groups[0]["params"][0].is_cuda
        betas = (config.beta1, config.beta2)
        super().__init__(groups, config.learning_rate, betas=betas, eps=config.epsilon, fused=True, capturable=on_gpu)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.full((), NO_CORRECTION, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the moments. The settings stay those of this run: earlier versions and other devices have others."""
        own = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            parameters = group["params"]
            group.clear()
            group |= {"params": parameters, **settings}
        for state in self.state.values():  # earlier versions hold the true step
            state["step"] = torch.full_like(state["exp_avg"].flatten()[0], NO_CORRECTION, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        skipped = getattr(self, "found_inf", None)  # set by the loss scaler, which then skips the step
        for group in self.param_groups:
            if group["decay"]:
                lost = group["rate"] * group["decay"]
                kept = 1 - lost if skipped is None else 1 - lost * (1 - skipped)
                torch._foreach_mul_([p for p in group["params"] if p.grad is not None], kept)
        return super().step(closure)


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


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Loads a stored state, and gives its tensors the memory format of their parameters.

    The stored run may have had another format, and torch's fused optimizers pair the elements by their place in memory.
    """
    optimizer.load_state_dict(stored)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach()


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the parameters that take a gradient. Frozen parameters get no optimizer state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        groups, nesterov = decayed(parameters, config), config.momentum > 0
        return [torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)]
    if config.optimizer == "adam":
        return [KerasAdam(decayed(parameters, config), config, decoupled=False)]
    kernels = [p for p in parameters if config.optimizer == "muon" and p.ndim == 4]
    others = [p for p in parameters if not any(p is kernel for kernel in kernels)]
    adamw = KerasAdam(decayed(others, config), config, decoupled=True)
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
    """Sets the learning rates for the step, with Adam's bias corrections. Returns the learning rate.

    With muon it returns the learning rate of the AdamW parameters.
    """
    factor = schedule_factor(config, step, num_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            device = group["params"][0].device
            if isinstance(optimizer, Muon):
                group["lr"] = factor * config.muon_learning_rate
            elif isinstance(optimizer, KerasAdam):
                correction = math.sqrt(1 - config.beta2 ** (step + 1)) / (1 - config.beta1 ** (step + 1))
                set_number(group, "lr", factor * config.learning_rate * correction, device)
                set_number(group, "rate", factor * config.learning_rate, device)
            else:
                set_number(group, "lr", factor * config.learning_rate, device)
    return factor * config.learning_rate


class Average(AveragedModel):
    """The exponential moving average of weights and buffers.

    The decay warms up: after n steps it is at most (1 + n) / (10 + n), as in timm and TensorFlow. Otherwise the
    average of a short run would consist mostly of its random initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay
        self.numbers: dict[str, Any] = {}

    def set_step(self) -> None:
        """Sets the weight of the next values, and counts them. Call it before each update."""
        n = int(self.n_averaged)
        new = 1.0 if n == 0 else 1 - min(self.decay, (1 + n) / (10 + n))
        set_number(self.numbers, "new", new, next(self.module.parameters()).device)
        self.n_averaged += 1

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Adds the model's values to the average. Waits for no device."""
        averages, values = (
            [t for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()] for m in (self.module, model)
        )
        new = self.numbers["new"]
        if isinstance(new, float):
            torch._foreach_lerp_(averages, values, new)
        else:
            torch._foreach_lerp_(averages, values, [new] * len(values))


def average_of(model: nn.Module, config: OptimConfig) -> Average | None:
    """Returns the average of the model's weights, or None if `ema_decay` is 0."""
    return Average(model, config.ema_decay) if config.ema_decay else None
