"""The exchange of gradients and the verdict on what bounds a run."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.train.communication import Communication
from cifar_dist.train.loop import Clock
from cifar_dist.train.metrics import bottleneck_verdict

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
    first = communication.seconds()
    assert first > 0
    assert communication.seconds() == first  # nothing more has been exchanged
    clock = Clock(communication)
    assert communication.seconds() == 0  # a clock starts anew
    communication._pairs.append((1.0, 1.25))
    rates = clock.rates()
    assert rates["communication_seconds"] == 0.25
    assert rates["compute_seconds"] == pytest.approx(rates["seconds"] - 0.25, abs=0.002)


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
