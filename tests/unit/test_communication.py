"""The exchange of gradients and the verdict on what bounds a run."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.config import Config
from cifar_dist.models.fan import Fan
from cifar_dist.models.resnet50v2 import ResNet50V2
from cifar_dist.run.network import Precision
from cifar_dist.train import communication
from cifar_dist.train.assemble import wrap
from cifar_dist.train.communication import Communication, FactoredLinear, factor_layers, parallel
from cifar_dist.train.diagnosis import bottleneck_verdict
from cifar_dist.train.loop import Clock
from cifar_dist.train.moment import Moment

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(gradient_dtype, x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    parallel = DistributedDataParallel(model)
    communication = Communication(parallel, gradient_dtype, CPU)
    parallel(x).square().sum().backward()
    communication.end()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), communication


@pytest.mark.usefixtures("group")
def test_gradients_are_exchanged_in_the_type_that_was_asked_for():
    x = torch.rand(5, 9)
    exact, half = gradients("fp32", x)[0], gradients("bf16", x)[0]
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    plain(x).square().sum().backward()
    assert torch.allclose(exact, torch.cat([p.grad.flatten() for p in plain.parameters()]))
    assert torch.equal(half, exact.bfloat16().float())
    assert not torch.equal(half, exact)


@pytest.mark.usefixtures("group")
def test_waiting_is_measured_and_taken_out_of_computing():
    _, communication = gradients("fp32", torch.rand(5, 9))
    ((start, end),) = communication.take()
    assert end.seconds_since(start) > 0
    assert communication.take() == []  # nothing more has been exchanged
    communication.end()
    clock = Clock(communication)
    assert communication.take() == []  # a clock starts anew
    for seconds in (0.25, 0.5):  # each lap counts from the start
        communication._waits.append((at(1.0), at(1.25)))
        rates = clock.lap().rates()
        assert rates["communication_seconds"] == seconds
        assert rates["compute_seconds"] == pytest.approx(rates["seconds"] - seconds, abs=0.002)


def at(seconds: float) -> Moment:
    moment = Moment(CPU)
    moment._time = seconds
    return moment


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("make", "num_rows", "dtype", "chosen"),
    [
        (Fan, 64, torch.bfloat16, ["classifier.0"]),
        (Fan, 510, torch.bfloat16, ["classifier.0"]),
        (Fan, 511, torch.bfloat16, []),
        (Fan, 255, torch.float32, ["classifier.0"]),
        (Fan, 256, torch.float32, []),
        (lambda: Fan().requires_grad_(False), 64, torch.bfloat16, []),
        (ResNet50V2, 64, torch.bfloat16, []),
    ],
)
def test_factors_are_exchanged_where_they_are_few_and_the_gradient_large(make, num_rows, dtype, chosen):
    """The first Dense layer of Fan has 165,888 x 512 weights: 340 MB, which 1,020 rows of both in bf16 just are."""
    model = make()
    factor_layers(model, num_rows, dtype)
    assert [name for name, module in model.named_modules() if isinstance(module, FactoredLinear)] == chosen


@pytest.mark.usefixtures("group")
def test_a_layer_with_factors_evaluates_and_computes_in_mixed_precision_as_it_did(monkeypatch):
    monkeypatch.setattr(communication, "BUCKET_BYTES", 1000)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)), torch.rand(5, 64, requires_grad=True)

    def run(network):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(x)
        y.float().square().sum().backward()
        found = [x.grad, *(p.grad for p in model.parameters())]
        x.grad = None
        model.zero_grad(set_to_none=True)
        return y, found

    y, plain = run(model)
    wrapped, exchange = parallel(model, CPU, "fp32", (5, torch.bfloat16))
    exchange.num_rows = 5
    shared_y, shared = run(wrapped)
    assert isinstance(model[0], FactoredLinear)
    assert torch.equal(shared_y, y)
    for mine, theirs in zip(shared, plain, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.allclose(mine, theirs, rtol=0.01, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(x), F.linear(F.linear(x, *model[0].parameters()).tanh(), *model[2].parameters()))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("settings", "world", "chosen"),
    [
        ({"global_batch_size": 10, "precision": "fp32"}, 2, True),
        ({"global_batch_size": 11, "precision": "fp32"}, 2, False),
        ({"global_batch_size": 11, "precision": "bf16"}, 2, True),
        ({"global_batch_size": 10, "precision": "fp32", "accumulation_steps": 2}, 2, False),
        ({"global_batch_size": 10, "precision": "fp32"}, 1, False),
    ],
)
def test_workers_on_cpus_exchange_factors_by_themselves(settings, world, chosen, monkeypatch):
    """The first layer's gradient has 8 KiB: twice its factors in fp32 are less of ten images, and more of eleven."""
    monkeypatch.setattr(communication, "BUCKET_BYTES", 1000)
    config, model = Config().replace(**settings), nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 3))
    precision = Precision(config.loop.precision, CPU)
    state = SimpleNamespace(
        config=config, trainable=model, world=world, device=CPU, precision=precision, communication=None, compiles=False
    )
    wrap(state, 1000)
    assert isinstance(model[0], FactoredLinear) is chosen
    assert isinstance(state.trainable, DistributedDataParallel) is (world > 1)
    assert (state.communication is None) is (world == 1)
    if chosen:
        assert model[0].communication is state.communication


@pytest.mark.parametrize(
    ("waits", "words"),
    [
        ((100, 5, 3), "compute-bound: 92.0% computing, 5.0% waiting for input, 3.0% for gradients"),
        ((100, 12, 11), "input-bound: 77.0% computing, 12.0% waiting for input, 11.0% for gradients"),
        ((100, 12, 30), "communication-bound: 58.0% computing, 12.0% waiting for input, 30.0% for gradients"),
    ],
)
def test_verdict(waits, words):
    assert bottleneck_verdict(*map(float, waits)).startswith(words)
