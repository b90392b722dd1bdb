"""Keras's layers without weights, where torch has none or orders the values in another way."""

import torch
from torch import nn


class Flatten(nn.Module):
    """Float [n, C, H, W] -> [n, H * W * C], in Keras's order of channels last, whatever x's memory format."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class GlobalAveragePooling(nn.Module):
    """Float [n, C, H, W] -> [n, C], the mean over height and width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))
