"""ResNet50V2 with the base of keras.applications and the deck's head."""

import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.models.layers import Dropout, GlobalAveragePooling, KerasBatchNorm

STACKS = ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 1))  # width, blocks, stride of the last block
BASE_EPSILON = 1.001e-5  # from keras.applications
DENSE_UNITS = (512, 256, 128)


class Block(nn.Module):
    """Pre-activation bottleneck. The last block of a stack has the stride, and its shortcut subsamples the input."""

    def __init__(self, channels: int, width: int, stride: int, project: bool, momentum: float) -> None:
        super().__init__()
        self.stride = stride
        self.preact_bn = KerasBatchNorm(channels, BASE_EPSILON, momentum)
        self.shortcut = nn.Conv2d(channels, 4 * width, 1) if project else None
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = KerasBatchNorm(width, BASE_EPSILON, momentum)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = KerasBatchNorm(width, BASE_EPSILON, momentum)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        preact = F.relu(self.preact_bn(x))
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.shortcut is None else self.shortcut(preact)
        y = F.relu(self.bn1(self.conv1(preact)))
        y = F.relu(self.bn2(self.conv2(y)))
        return shortcut + self.conv3(y)


class ResNet50V2Base(nn.Module):
    """Float [n, 3, S, S] -> features [n, 2048, S/32, S/32]."""

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        blocks: list[Block] = []
        channels = 64
        for width, num_blocks, stride in STACKS:
            for i in range(num_blocks):
                blocks.append(Block(channels, width, stride if i == num_blocks - 1 else 1, i == 0, momentum))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.post_bn = KerasBatchNorm(channels, BASE_EPSILON, momentum)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.pad(self.conv1(images), (1, 1, 1, 1))  # zeros, not -inf: the values may be negative
        x = self.blocks(F.max_pool2d(x, 3, stride=2))
        return F.relu(self.post_bn(x))


class HeadDense(nn.Sequential):
    """Dense, BatchNorm, Dropout 0.1, ReLU: the deck's order."""

    def __init__(self, fan_in: int, fan_out: int, momentum: float) -> None:
        super().__init__(
            nn.Linear(fan_in, fan_out), KerasBatchNorm(fan_out, momentum=momentum), Dropout(0.1), nn.ReLU()
        )


class ResNet50V2(nn.Module):
    """The base, then the deck's head: a valid 3x3 Conv2D of 128 filters, ReLU, global average pooling, Dense 512, 256,
    128 and the logits.

    Input: float [n, 3, S, S] with S >= 96. Output: logits [n, num_classes], as the loss includes the deck's softmax.
    Without `finetune` the base is frozen: it takes no gradient, and its BatchNorm uses moving statistics even in
    training mode.
    """

    def __init__(self, num_classes: int = 10, finetune: bool = False, batchnorm_momentum: float = 0.99) -> None:
        super().__init__()
        self.finetune = finetune
        self.base = ResNet50V2Base(batchnorm_momentum)
        self.base.requires_grad_(finetune)
        self.conv, self.activation = nn.Conv2d(2048, 128, 3), nn.ReLU()
        self.pool = GlobalAveragePooling()
        units = [128, *DENSE_UNITS]
        dense = [HeadDense(a, b, batchnorm_momentum) for a, b in zip(units, DENSE_UNITS, strict=False)]
        self.classifier = nn.Sequential(*dense, nn.Linear(DENSE_UNITS[-1], num_classes))

    def train(self, mode: bool = True) -> "ResNet50V2":
        super().train(mode)
        self.base.train(mode and self.finetune)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.finetune:
            features = self.base(images)
        else:
            with torch.no_grad():
                features = self.base(images)
        return self.head(features)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the base [n, 2048, S/32, S/32] -> logits [n, num_classes]."""
        return self.classifier(self.pool(self.activation(self.conv(features))))
