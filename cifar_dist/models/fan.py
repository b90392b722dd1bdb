"""Fan: the deck's convolutional network for 32-px images, layer by layer as in the deck's code."""

import torch
from torch import nn

from cifar_dist.models.layers import Dropout, Flatten, KerasBatchNorm

CONV_CHANNELS = (32, 64, 128, 128, 256, 256, 512)
DENSE_UNITS = (512, 128)
DROPOUTS = (0.05, 0.1, 0.1, 0.1, 0.1, 0.1)  # after each convolution block but the last


class Fan(nn.Module):
    """Seven valid 3x3 convolutions, each with BatchNorm, ReLU and (the first six) dropout; then two Dense blocks.

    Input: float [n, 3, 32, 32]. Output: logits [n, num_classes], as the loss includes the deck's softmax.
    """

    def __init__(self, num_classes: int = 10, batchnorm_momentum: float = 0.99) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for i, width in enumerate(CONV_CHANNELS):
            layers += [nn.Conv2d(channels, width, 3), KerasBatchNorm(width, momentum=batchnorm_momentum), nn.ReLU()]
            if i < len(DROPOUTS):
                layers.append(Dropout(DROPOUTS[i]))
            channels = width
        self.features = nn.Sequential(*layers)
        self.flatten = Flatten()
        side = 32 - 2 * len(CONV_CHANNELS)
        units = [side * side * channels, *DENSE_UNITS]
        layers = []
        for fan_in, fan_out in zip(units, DENSE_UNITS, strict=False):
            layers += [nn.Linear(fan_in, fan_out), KerasBatchNorm(fan_out, momentum=batchnorm_momentum), nn.ReLU()]
        self.classifier = nn.Sequential(*layers, nn.Linear(units[-1], num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.flatten(self.features(images)))
