"""A small network, and its weights as Keras's files have them."""

import numpy as np
import torch
from torch import nn

from cifar_dist.models.layers import KerasBatchNorm

NUMBERED = ("conv2d", "batch_normalization", "conv2d_1", "batch_normalization_1", "dense", "dense_1")


def small(seed: int) -> nn.Sequential:
    """Six layers, which Keras 3 calls NUMBERED; no value is 0."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), KerasBatchNorm(4), nn.Conv2d(4, 5, 3, bias=False), KerasBatchNorm(5)]
    network = nn.Sequential(*layers, nn.Linear(5, 6), nn.Linear(6, 6))
    for tensor in network.state_dict().values():
        tensor.uniform_(0.1, 1)
    return network


def keras_layout(tensor: torch.Tensor) -> np.ndarray:
    """[out, in, h, w] -> [h, w, in, out], [out, in] -> [in, out]."""
    value = tensor.detach().numpy()
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
