"""Keras's layers that torch lacks or computes differently."""

import torch
import torch.nn.functional as F
from torch import nn


class KerasBatchNorm(nn.Module):
    """Normalizes [n, channels, ...] per channel as Keras does.

    `momentum` is the share of the old moving statistics kept at each training step (Keras's default: 0.99). torch's
    BatchNorm puts the unbiased variance into the moving average, and refuses a single value per channel.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_channels: int, epsilon: float = 1e-3, momentum: float = 0.99) -> None:
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.epsilon
            )
        num_values = x.numel() // x.shape[1]
        if num_values == 1:  # variance 0: only the bias affects the output and gets a gradient
            self.running_mean.lerp_(x.detach().reshape(-1).float(), 1 - self.momentum)
            self.running_var.mul_(self.momentum)
            shape = (1, -1, *[1] * (x.ndim - 2))
            return (x - x) * self.weight.view(shape) + self.bias.view(shape)
        moving = self.running_var.clone()  # autograd saves this tensor
        y = F.batch_norm(x, self.running_mean, moving, self.weight, self.bias, True, 1 - self.momentum, self.epsilon)
        # torch added (1 - momentum) * unbiased variance; the biased variance is (n - 1) / n of the unbiased.
        with torch.no_grad():
            self.running_var.mul_(self.momentum / num_values).add_(moving, alpha=1 - 1 / num_values)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, epsilon={self.epsilon}, momentum={self.momentum}"


LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """nn.Dropout that on a CPU uses 16 random bits for each element of the mask: four elements per torch draw.

    torch draws one value per element, in one thread, which took a fifth of a training step of Fan on two cores. The
    dropout probability is rounded to 1/65536, and kept elements are scaled by the rounded probability.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_dropped = round(self.p * LEVELS)
        plain = not self.training or x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not 0 < num_dropped < LEVELS:
            return super().forward(x)
        random = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = random.view(torch.int16)[: x.numel()] >= num_dropped - LEVELS // 2
        mask = torch.empty_like(x, dtype=torch.bool)  # dense, in the order of x's memory
        mask = kept.as_strided(mask.shape, mask.stride())
        return x * mask * (LEVELS / (LEVELS - num_dropped))


class Flatten(nn.Module):
    """Float [n, C, H, W] -> [n, H * W * C], in Keras's channels-last order, for any memory format of x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class GlobalAveragePooling(nn.Module):
    """Float [n, C, H, W] -> [n, C], the mean over height and width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))
