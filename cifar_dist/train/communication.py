"""The exchange of gradients between workers: in which type, and for how long training waits for it."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel


class Communication:
    """Measures, in every step, from the last gradient of the backward pass to the end of the exchange.

    What overlaps with the backward pass costs no time and is not counted; waiting for a slower worker is. On a GPU
    two events in the stream that computes, which `seconds` reads.
    """

    def __init__(self, model: DistributedDataParallel, gradient_dtype: str, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.exchange = bf16_compress_hook if gradient_dtype == "bf16" else allreduce_hook
        self.reset()
        model.register_comm_hook(dist.group.WORLD, self._hook)

    def reset(self) -> None:
        self._seconds, self._last = 0.0, self._now()
        self._pairs: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _hook(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            self._last = self._now()
        return self.exchange(group, bucket)

    def end(self) -> None:
        """After the backward pass that exchanged gradients."""
        self._pairs.append((self._last, self._now()))

    def seconds(self) -> float:
        """Since the reset, all steps together; on a GPU it waits for the device."""
        for start, end in self._pairs:
            if self.on_gpu:
                end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000 if self.on_gpu else end - start
        self._pairs.clear()
        return self._seconds
