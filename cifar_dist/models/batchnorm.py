"""Keras's BatchNormalization: the biased variance enters the moving average."""

import torch
import torch.nn.functional as F
from torch import nn


class KerasBatchNorm(nn.Module):
    """Normalizes [n, channels, ...] per channel as Keras does.

    `momentum` is the share of the old moving statistics kept at each training step (Keras's default 0.99). torch's
    own layer puts the unbiased variance into the moving average and refuses a single value per channel.
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
        if num_values == 1:  # variance 0: what is left, also of the gradient, is the bias
            self.running_mean.lerp_(x.detach().reshape(-1).float(), 1 - self.momentum)
            self.running_var.mul_(self.momentum)
            shape = (1, -1, *[1] * (x.ndim - 2))
            return (x - x) * self.weight.view(shape) + self.bias.view(shape)
        moving = self.running_var.clone()  # autograd keeps the tensor it is given
        y = F.batch_norm(x, self.running_mean, moving, self.weight, self.bias, True, 1 - self.momentum, self.epsilon)
        # torch added (1 - momentum) * unbiased; (n - 1) / n of that is the biased part.
        with torch.no_grad():
            self.running_var.mul_(self.momentum / num_values).add_(moving, alpha=1 - 1 / num_values)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, epsilon={self.epsilon}, momentum={self.momentum}"
