"""The networks, independent of data and training."""

from typing import TYPE_CHECKING

from cifar_dist.models.spec import MODELS

if TYPE_CHECKING:  # naming the networks needs no torch
    from torch import nn


def build(
    name: str, num_classes: int = 10, *, finetune: bool = False, batchnorm_momentum: float = 0.99, seed: int = 0
) -> "nn.Module":
    """Returns the network with Keras's initial values (glorot uniform, zero bias), drawn from `seed`.

    Input: float [n, 3, S, S], already normalized, in any memory format; the network's ModelSpec gives the sizes S.
    Output: logits [n, num_classes]. `finetune`: train the base too, if the network has one. Raises ValueError for an
    unknown name.
    """
    import torch  # noqa: PLC0415
    from torch import nn  # noqa: PLC0415

    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    spec = MODELS[name]
    settings = {"finetune": finetune} if spec.has_base else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.load_builder()(num_classes, batchnorm_momentum=batchnorm_momentum, **settings)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def count_parameters(model: "nn.Module") -> tuple[int, int]:
    """Returns (total, trainable) as Keras counts: BatchNorm's moving statistics are parameters, but not trainable."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(t.numel() for t in model.state_dict().values()), trainable


__all__ = ["MODELS", "build", "count_parameters"]
