"""Splits ResNet50V2 into a frozen base, which costs only an optimized forward pass, and the head."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.models.resnet50v2 import Block, ResNet50V2, ResNet50V2Base

# Images per forward pass of the base on a CPU. So few fit into the CPU's caches and into memory that the C library
# reuses (it returns blocks above 32 MiB at once). benchmarks/step.py compares other numbers.
CPU_CHUNK = 8


def fold(conv: nn.Conv2d, batchnorm: KerasBatchNorm) -> nn.Conv2d:
    """Returns a convolution that computes batchnorm(conv(x)) in inference mode. Folds in float64."""
    scale = batchnorm.weight.double() / (batchnorm.running_var.double() + batchnorm.epsilon).sqrt()
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
    folded.to(conv.weight.device)
    bias = 0 if conv.bias is None else conv.bias.double()
    folded.weight.data = (conv.weight * scale[:, None, None, None]).to(conv.weight.dtype)
    folded.bias = nn.Parameter(((bias - batchnorm.running_mean) * scale + batchnorm.bias).to(conv.weight.dtype))
    return folded


class FrozenBase:
    """Images float [n, 3, S, S] -> features [n, 2048, S/32, S/32] in `dtype`, in inference mode.

    Copies the base with its current weights, converted to `dtype`; the argument `base` stays unchanged. In the copy the
    two BatchNorms that follow a convolution are folded into it. The other BatchNorms stay, because a ReLU or the
    shortcut comes between. Activations are overwritten in place. An image's features do not depend on its batch.
    """

    num_features = 2048

    @torch.no_grad()
    def __init__(self, base: ResNet50V2Base, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.base = copy.deepcopy(base).eval().requires_grad_(False)
        for block in self.base.blocks:
            assert isinstance(block, Block)
            block.conv1, block.conv2 = fold(block.conv1, block.bn1), fold(block.conv2, block.bn2)
            block.bn1 = block.bn2 = nn.Identity()  # type: ignore[assignment]
        self.base.to(dtype).to(memory_format=torch.channels_last)
        # On a GPU, launches dominate the cost of small kernels, so callers compile the base there.
        self.forward = self._forward

    def compile(self, sizes: set[int]) -> None:
        """Compiles the forward pass for batches of the given sizes, each at its first use. Others run as they are."""
        compiled = torch.compile(self._forward, dynamic=False)
        at_once = {CPU_CHUNK} if next(self.base.parameters()).device.type == "cpu" else sizes
        self.forward = lambda images: (compiled if len(images) in at_once else self._forward)(images)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        n, chunk = len(images), CPU_CHUNK if images.device.type == "cpu" else len(images)
        side = -(-images.shape[-1] // 32)
        # Created outside inference mode, so that the head's backward pass can use it.
        features = torch.empty(
            (n, self.num_features, side, side),
            dtype=self.dtype,
            device=images.device,
            memory_format=torch.channels_last,
        )
        with torch.inference_mode():
            for first in range(0, n, chunk):
                features[first : first + chunk] = self.forward(images[first : first + chunk])
        return features

    def _forward(self, images: torch.Tensor) -> torch.Tensor:
        net: Any = self.base
        x = images.to(self.dtype, memory_format=torch.channels_last)
        x = F.max_pool2d(F.pad(net.conv1(x), (1, 1, 1, 1)), 3, stride=2)
        for block in net.blocks:
            preact = block.preact_bn(x).relu_()
            short = x[:, :, :: block.stride, :: block.stride] if block.shortcut is None else block.shortcut(preact)
            x = block.conv3(block.conv2(block.conv1(preact).relu_()).relu_()).add_(short)
        return net.post_bn(x).relu_()


class Head(nn.Module):
    """The part after the base, which takes the base's features. It uses the model's modules, so it trains the model."""

    def __init__(self, model: ResNet50V2) -> None:
        super().__init__()
        self.conv, self.activation, self.pool, self.classifier = (
            model.conv,
            model.activation,
            model.pool,
            model.classifier,
        )

    forward = ResNet50V2.head  # the same function, so that both cannot differ


def split_frozen(model: nn.Module, dtype: torch.dtype) -> tuple[FrozenBase | None, nn.Module]:
    """Returns (frozen base with the current weights, head) of a ResNet50V2 without fine-tuning, else (None, model)."""
    if isinstance(model, ResNet50V2) and not model.finetune:
        return FrozenBase(model.base, dtype), Head(model)
    return None, model


def inference_copy(model: nn.Module, dtype: torch.dtype) -> "InferenceModel":
    """Returns the network for evaluation; `dtype`: of its frozen base. The head computes as autocast says."""
    return InferenceModel(*split_frozen(model, dtype))


class InferenceModel:
    """The network for evaluation: images -> logits."""

    def __init__(self, base: FrozenBase | None, head: nn.Module) -> None:
        self.base, self.head = base, head.eval()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(images) if self.base else images)
