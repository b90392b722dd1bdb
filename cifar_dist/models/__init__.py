"""The two networks. They know neither data nor training."""

import torch
from torch import nn

from cifar_dist.models.fan import Fan
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.models.resnet50v2 import ResNet50V2
from cifar_dist.versions import MODEL_VERSIONS

MODELS = tuple(MODEL_VERSIONS)


def build(
    name: str, num_classes: int = 10, *, finetune: bool = False, batchnorm_momentum: float = 0.99, seed: int = 0
) -> nn.Module:
    """The network with Keras's initial values (glorot uniform, zero bias), drawn from `seed`.

    Input: float [n, 3, S, S], already normalized, in any memory format (fan: S = 32). Output: logits
    [n, num_classes]. `finetune` trains the ResNet base too; fan ignores it. Raises ValueError for another name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (
            Fan(num_classes, batchnorm_momentum)
            if name == "fan"
            else ResNet50V2(num_classes, finetune, batchnorm_momentum)
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(total, trainable) as Keras counts them: BatchNorm's moving statistics are parameters that are not trained."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(t.numel() for t in model.state_dict().values()), trainable


__all__ = ["MODELS", "KerasBatchNorm", "build", "count_parameters"]
