"""Sends small arrays to a device, batch after batch, without a wait for the device."""

import numpy as np
import torch

NUM_SLOTS = 64  # arrays that the host may be ahead of the device


class ToDevice:
    """Copies int64 arrays to `device`.

    On a GPU through pinned memory that is kept: to get some from the driver waits while another thread copies, such as
    the saver's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ring: list[PinnedSlot] = []
        self._num_sent = 0

    def __call__(self, numbers: np.ndarray) -> torch.Tensor:
        """Returns the array on the device."""
        if self.device.type != "cuda":
            return torch.from_numpy(numbers)
        slot = self._num_sent % NUM_SLOTS
        if slot == len(self._ring):
            self._ring.append(PinnedSlot())
        self._num_sent += 1
        return self._ring[slot].send(numbers, self.device)


class PinnedSlot:
    """Pinned memory from which one array at a time is sent to a GPU."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.int64)
        self._sent = torch.cuda.Event()

    def send(self, numbers: np.ndarray, device: torch.device) -> torch.Tensor:
        self._sent.synchronize()  # the array sent before is on the device
        if self._memory.size < numbers.size:
            # Kept as an array: validation runs in inference mode, whose tensors training could not write to later.
            self._memory = torch.empty(numbers.size, dtype=torch.int64, pin_memory=True).numpy()
        host = self._memory[: numbers.size].reshape(numbers.shape)
        host[:] = numbers
        on_device = torch.from_numpy(host).to(device, non_blocking=True)
        self._sent.record()
        return on_device
