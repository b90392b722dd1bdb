"""Moments on a device, and the time between them."""

import time

import torch


class Moment:
    """The moment when a device has done all work that it was given before. To take it does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event:
            self._event.record()

    def seconds_since(self, earlier: "Moment") -> float:
        """Returns the seconds between two moments of one device. Waits until both have passed."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000
