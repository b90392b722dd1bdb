"""The frozen base as it is run: folded, in inference mode, the model's own weights untouched."""

import pytest
import torch

from cifar_dist import models
from cifar_dist.models.frozen import FrozenBase, inference_copy, split_frozen
from cifar_dist.models.layers import Dropout, KerasBatchNorm


def resnet(finetune=False):
    """With random moving statistics, so that a BatchNorm folded wrongly shows."""
    model = models.build("resnet50v2", seed=1, finetune=finetune).eval()
    random = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, KerasBatchNorm):
            module.running_mean.normal_(0, 0.1, generator=random)
            module.running_var.uniform_(0.5, 1.5, generator=random)
    return model


@pytest.fixture(scope="module")
def model():
    return resnet()


@pytest.fixture(scope="module")
def images():
    return torch.rand(11, 3, 96, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1


def error(found, expected):
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_features_are_those_of_the_plain_base(model, images, dtype, tolerance):
    with torch.no_grad():
        expected = model.base(images)
    features = FrozenBase(model.base, dtype)(images)
    assert features.dtype == dtype
    assert features.shape == expected.shape
    assert error(features, expected) < tolerance


def test_an_image_has_the_same_features_in_any_batch(model, images):
    base = FrozenBase(model.base, torch.float32)
    assert torch.equal(base(images)[7:10], base(images[7:10]))


def test_the_models_own_weights_stay_plain(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base, head = split_frozen(model, torch.bfloat16)
    head.train()
    head(base(images).float()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict(prefix="base.").items())
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.conv.parameters())  # the head's modules are the model's
    model.zero_grad()
    assert [name for name in model.state_dict()] == list(before)


def test_head_on_features_is_the_model(model, images):
    model.eval()
    with torch.no_grad():
        expected = model(images)
        assert error(inference_copy(model, torch.float32)(images), expected) < 1e-5


def test_what_is_trained_whole_is_not_split():
    tuned = resnet(finetune=True)
    assert split_frozen(tuned, torch.float32) == (None, tuned)
    fan = models.build("fan")
    assert split_frozen(fan, torch.float32) == (None, fan)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_the_share_it_is_told_and_keeps_the_mean(memory_format):
    torch.manual_seed(3)
    x = torch.ones(40, 30, 20, 20).to(memory_format=memory_format)
    y = Dropout(0.1).train()(x)
    n = x.numel()
    assert abs((y == 0).float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / n) ** 0.5
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.9], rel=1e-4)
    by_channel, by_image = (y == 0).float().mean((0, 2, 3)), (y == 0).float().mean((1, 2, 3))
    assert by_channel.std() < 2 * (0.09 / (n / 30)) ** 0.5  # no part of the tensor is favoured
    assert by_image.std() < 2 * (0.09 / (n / 40)) ** 0.5


def test_dropout_follows_torchs_seed_and_passes_the_gradient_of_what_it_keeps():
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        x = torch.ones(7, 3, 5, requires_grad=True)
        y = Dropout(0.5).train()(x)
        y.sum().backward()
        assert torch.equal(x.grad, y)
        drawn.append(y.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_does_nothing_in_inference_mode_or_at_zero():
    x = torch.rand(9)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0).train()(x), x)
