"""The compiled network runs full batches, and nothing else."""

import pytest
import torch
from torch import nn

from cifar_dist.config import Config
from cifar_dist.data.order import num_micro_batches, rank_part
from cifar_dist.train.compiled import CompiledForFullBatches, full_sizes


def test_only_full_batches_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def compiled(network: nn.Module, **options: object):
        given.update(options)
        return lambda x: network(x) + 100

    monkeypatch.setattr(torch, "compile", compiled)
    network = CompiledForFullBatches(nn.Identity(), {4, 5})
    assert [float(network(torch.zeros(n))[0]) for n in (4, 5, 3, 6)] == [100, 100, 0, 0]
    assert given == {"dynamic": False}


@pytest.mark.parametrize(
    ("batch", "world", "accumulation"), [(64, 1, 1), (64, 3, 1), (64, 3, 4), (10, 4, 2), (4, 1, 4)]
)
def test_the_sizes_are_those_of_every_full_step(batch: int, world: int, accumulation: int) -> None:
    loop = Config().replace(global_batch_size=batch, accumulation_steps=accumulation).loop
    for rank in range(world):
        found = set()
        for step in range(3):
            start, stop, size, _ = rank_part(step, 3 * batch + 1, batch, rank, world)
            assert size == batch
            num_chunks = num_micro_batches(stop - start, accumulation)
            found |= {len(part) for part in torch.zeros(stop - start).tensor_split(num_chunks)}
        assert full_sizes(loop, 3 * batch + 1, rank, world) == found
