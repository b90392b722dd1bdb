"""The two networks: parameter counts, layers as the deck has them, Keras's BatchNorm, the frozen base, seeds."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar_dist import models
from cifar_dist.config import OptimConfig
from cifar_dist.models.layers import KerasBatchNorm
from cifar_dist.models.resnet50v2 import Block
from cifar_dist.train.optim import make_optimizers


@pytest.fixture(scope="module")
def fan() -> nn.Module:
    return models.build("fan").eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """With the frozen base."""
    return models.build("resnet50v2").eval()


@pytest.fixture(scope="module")
def finetuned() -> nn.Module:
    return models.build("resnet50v2", 7, finetune=True, batchnorm_momentum=0.8)


def images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Counts and layers.


def test_parameter_counts_are_keras_s(fan, resnet):
    assert models.count_parameters(fan) == (87_316_426, 87_312_394)
    assert models.count_parameters(resnet) == (26_159_370, 2_592_778)


def test_finetuning_trains_all_but_the_moving_statistics(finetuned):
    total, trainable = models.count_parameters(finetuned)
    statistics = sum(2 * m.weight.numel() for m in finetuned.modules() if isinstance(m, KerasBatchNorm))
    assert total == 26_159_370 - 3 * (128 + 1)  # seven classes instead of ten
    assert trainable == total - statistics


def described(module: nn.Module) -> str:
    match module:
        case nn.Conv2d():
            kernel = "x".join(map(str, module.kernel_size))
            stride = f" stride {module.stride[0]}" if module.stride[0] > 1 else ""
            bias = "" if module.bias is not None else " no bias"
            return f"conv {module.in_channels}-{module.out_channels} {kernel}{stride} pad {module.padding[0]}{bias}"
        case nn.Linear():
            return f"dense {module.in_features}-{module.out_features}"
        case KerasBatchNorm():
            return f"batchnorm {module.weight.numel()} {module.epsilon:g}"
        case nn.Dropout():
            return f"dropout {module.p:g}"
    return type(module).__name__.lower()


def test_fan_has_the_deck_s_layers_in_order(fan):
    convolutions = [(3, 32, 0.05), (32, 64, 0.1), (64, 128, 0.1), (128, 128, 0.1), (128, 256, 0.1), (256, 256, 0.1)]
    expected = []
    for a, b, p in convolutions:
        expected += [f"conv {a}-{b} 3x3 pad 0", f"batchnorm {b} 0.001", "relu", f"dropout {p:g}"]
    expected += ["conv 256-512 3x3 pad 0", "batchnorm 512 0.001", "relu"]
    assert [described(m) for m in fan.features] == expected
    assert [described(m) for m in fan.classifier] == [
        *("dense 165888-512", "batchnorm 512 0.001", "relu"),
        *("dense 512-128", "batchnorm 128 0.001", "relu"),
        "dense 128-10",
    ]


def test_fan_s_shapes(fan):
    with torch.no_grad():
        assert fan.features(images(2, 32)).shape == (2, 512, 18, 18)
        assert fan(images(2, 32)).shape == (2, 10)


def test_fan_flattens_in_keras_s_order(fan):
    """Height, width, channels; and the memory format of the input makes no difference."""
    x = images(2, 32)
    with torch.no_grad():
        features = fan.features(x)
        nhwc = torch.from_numpy(np.ascontiguousarray(features.numpy().transpose(0, 2, 3, 1)).reshape(2, -1))
        expected = fan.classifier(nhwc)
        assert torch.allclose(fan(x), expected, atol=1e-5)
        assert torch.allclose(fan(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5)
        assert not torch.allclose(fan.classifier(features.flatten(1)), expected, atol=1e-3)  # the order matters


def test_resnet_head_has_the_deck_s_layers_in_order(resnet):
    assert described(resnet.conv) == "conv 2048-128 3x3 pad 0"
    head = [described(m) for m in resnet.classifier.modules() if not isinstance(m, nn.Sequential)]
    expected = []
    for a, b in ((128, 512), (512, 256), (256, 128)):
        expected += [f"dense {a}-{b}", f"batchnorm {b} 0.001", "dropout 0.1", "relu"]
    assert head == [*expected, "dense 128-10"]


def test_resnet_head_has_its_relu_between_convolution_and_pooling(resnet):
    features = torch.randn(2, 2048, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        convolved = F.conv2d(features, resnet.conv.weight, resnet.conv.bias)
        expected = resnet.classifier(convolved.clamp(min=0).mean((2, 3)))
        assert torch.allclose(resnet.head(features), expected, atol=1e-5)
        assert not torch.allclose(resnet.classifier(convolved.mean((2, 3))), expected, atol=1e-3)


def test_resnet_base_has_keras_s_blocks(resnet):
    assert described(resnet.base.conv1) == "conv 3-64 7x7 stride 2 pad 3"
    expected, channels = [], 64
    for width, num_blocks, last_stride in ((64, 3, 2), (128, 4, 2), (256, 6, 2), (512, 3, 1)):
        for i in range(num_blocks):
            stride = " stride 2" if i == num_blocks - 1 and last_stride == 2 else ""
            expected.append(
                [f"batchnorm {channels} 1.001e-05"]
                + [f"conv {channels}-{4 * width} 1x1 pad 0"] * (i == 0)
                + [f"conv {channels}-{width} 1x1 pad 0 no bias", f"batchnorm {width} 1.001e-05"]
                + [f"conv {width}-{width} 3x3{stride} pad 1 no bias", f"batchnorm {width} 1.001e-05"]
                + [f"conv {width}-{4 * width} 1x1 pad 0"]
            )
            channels = 4 * width
    assert [[described(m) for m in block.children()] for block in resnet.base.blocks] == expected
    assert described(resnet.base.post_bn) == "batchnorm 2048 1.001e-05"


def test_resnet_s_shapes(resnet):
    with torch.no_grad():
        assert resnet.base(images(1, 96)).shape == (1, 2048, 3, 3)
        assert resnet(images(2, 96)).shape == (2, 10)


def test_resnet_pads_its_pooling_with_zeros(resnet):
    """Negative values next to the border lose against the zeros of the padding; -inf would keep them."""
    seen = []
    constant = resnet.base.conv1.register_forward_hook(lambda _m, _x, y: torch.full_like(y, -1))
    first = resnet.base.blocks[0].register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.no_grad():
        resnet.base(images(1, 96))
    constant.remove()
    first.remove()
    assert seen[0].shape == (1, 64, 24, 24)
    assert (seen[0][..., 0, :] == 0).all()
    assert (seen[0][..., :, 0] == 0).all()
    assert (seen[0][..., 1:, 1:] == -1).all()


def block(channels: int, stride: int, project: bool) -> Block:
    """A block whose residual branch gives zero: what comes out is the shortcut."""
    made = Block(channels, 2, stride, project, 0.99).eval()
    nn.init.zeros_(made.conv3.weight)
    nn.init.zeros_(made.conv3.bias)
    return made


@torch.no_grad()
def test_shortcut_of_a_last_block_subsamples_the_raw_input():
    x = images(2, 9).repeat(1, 3, 1, 1)[:, :8] - 0.5
    assert torch.equal(block(8, 2, project=False)(x), x[:, :, ::2, ::2])


@torch.no_grad()
def test_shortcut_of_a_first_block_projects_the_activated_input():
    x = images(2, 9) - 0.5
    made = block(3, 1, project=True)
    expected = made.shortcut(F.relu(made.preact_bn(x)))
    assert torch.allclose(made(x), expected)
    assert not torch.allclose(made(x), made.shortcut(x))


def test_initial_values_are_glorot_uniform_and_zero(resnet):
    for name, module in resnet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            area = math.prod(module.weight.shape[2:])
            limit = math.sqrt(6 / (area * (module.weight.shape[0] + module.weight.shape[1])))
            assert 0.98 * limit < module.weight.abs().max() <= limit * (1 + 1e-6), name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, KerasBatchNorm):
            state = [module.weight, module.running_var], [module.bias, module.running_mean]
            assert all((t == value).all() for value, part in zip((1, 0), state, strict=True) for t in part), name


def test_seed_alone_decides_the_initial_values(resnet):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again, other = models.build("resnet50v2"), models.build("resnet50v2", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    for name, tensor in resnet.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for layer in ("base.conv1.weight", "classifier.3.weight"):
        assert not torch.equal(resnet.state_dict()[layer], other.state_dict()[layer])


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="there are fan, resnet50v2"):
        models.build("vgg")


def test_batchnorm_momentum_reaches_every_layer(fan, finetuned):
    momenta = [{m.momentum for m in model.modules() if isinstance(m, KerasBatchNorm)} for model in (fan, finetuned)]
    assert momenta == [{0.99}, {0.8}]


# Frozen and not.


def train_steps(model: nn.Module, num_steps: int) -> torch.optim.Optimizer:
    (optimizer,) = make_optimizers(model, OptimConfig(learning_rate=1e-2))
    model.train()
    for step in range(num_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images(2, 96, step)), torch.tensor([0, 1])).backward()
        optimizer.step()
    return optimizer


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_frozen_base_does_not_change_while_the_head_trains():
    model = models.build("resnet50v2")
    before = copy_of(model)
    optimizer = train_steps(model, 2)
    assert not any(m.training for m in model.base.modules())
    assert model.classifier.training
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same if name.startswith("base.") else not same, name
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    with_state = {id(p) for p in optimizer.state}
    assert with_state == {id(p) for p in model.parameters() if p.requires_grad}


def test_finetuning_trains_base_and_moving_statistics(finetuned):
    before = copy_of(finetuned)
    train_steps(finetuned, 1)
    assert finetuned.base.training
    unchanged = [name for name, tensor in finetuned.state_dict().items() if torch.equal(tensor, before[name])]
    assert unchanged == []
    finetuned.eval()
    assert not any(m.training for m in finetuned.modules())


# BatchNorm.


@pytest.mark.parametrize("shape", [(2, 3), (5, 3), (2, 3, 4, 5)])
@pytest.mark.parametrize("momentum", [0.99, 0.8])
def test_batchnorm_follows_keras(shape, momentum):
    """Three steps against the definition in numpy: biased variance everywhere, `momentum` of the old one kept."""
    torch.manual_seed(0)
    layer = KerasBatchNorm(3, momentum=momentum)
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    scale, shift = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    mean, var = np.zeros(3), np.ones(3)
    axes = tuple(i for i in range(len(shape)) if i != 1)
    wide = (1, 3, *[1] * (len(shape) - 2))
    for _ in range(3):
        x = (3 * torch.randn(shape) + 1).numpy()
        batch_mean, batch_var = x.mean(axes), x.var(axes)
        mean, var = momentum * mean + (1 - momentum) * batch_mean, momentum * var + (1 - momentum) * batch_var
        normal = (x - batch_mean.reshape(wide)) / np.sqrt(batch_var.reshape(wide) + 1e-3)
        expected = normal * scale.reshape(wide) + shift.reshape(wide)
        np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-5)
    layer.eval()
    normal = (x - mean.reshape(wide)) / np.sqrt(var.reshape(wide) + 1e-3)
    expected = normal * scale.reshape(wide) + shift.reshape(wide)
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-5)  # inference moves nothing


def by_definition(x: torch.Tensor, layer: KerasBatchNorm) -> torch.Tensor:
    axes = [i for i in range(x.ndim) if i != 1]
    wide = (1, -1, *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(var + layer.epsilon) * layer.weight.view(wide) + layer.bias.view(wide)


@pytest.mark.parametrize("shape", [(4, 3), (1, 3), (2, 3, 2, 2), (1, 3, 1, 1)])
def test_batchnorm_gradients_are_those_of_the_definition(shape):
    """Also for a single value per channel, whose variance is 0: only the bias gets a gradient then."""
    torch.manual_seed(0)
    layer = KerasBatchNorm(3)
    nn.init.uniform_(layer.weight)
    x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
    leaves = (x, layer.weight, layer.bias)
    expected = torch.autograd.grad(by_definition(x, layer), leaves, upstream)
    found = torch.autograd.grad(layer(x), leaves, upstream)
    for name, a, b in zip(("input", "weight", "bias"), found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])
def test_batchnorm_takes_a_single_value_per_channel(shape):
    layer = KerasBatchNorm(3, momentum=0.9)
    nn.init.uniform_(layer.bias)
    y = layer(torch.full(shape, 5.0))
    assert torch.equal(y.flatten(), layer.bias)
    assert torch.allclose(layer.running_mean, torch.tensor(0.5))
    assert torch.allclose(layer.running_var, torch.tensor(0.9))


def test_batchnorm_keeps_its_statistics_in_full_precision_under_bf16():
    layer = KerasBatchNorm(3)
    for n in (4, 1):
        layer(torch.randn(n, 3).bfloat16()).float().sum().backward()
    assert {layer.running_mean.dtype, layer.running_var.dtype, layer.weight.grad.dtype} == {torch.float32}
    assert torch.isfinite(layer.running_var).all()
