"""A trace of a few training steps by torch.profiler, stored in the run's folder."""

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cifar_dist.run.folder import Run

NUM_SKIPPED, NUM_WARM_UP, NUM_RECORDED = 5, 2, 5  # steps


class Tracer:
    """Records NUM_RECORDED steps after the first steps, which are slower. Reports the trace's file name by `say`."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._num_steps, self._global_step, self._is_stored = 0, 0, False
        schedule = torch.profiler.schedule(wait=NUM_SKIPPED, warmup=NUM_WARM_UP, active=NUM_RECORDED, repeat=1)
        self._profiler = torch.profiler.profile(schedule=schedule, on_trace_ready=self._store)

    def start(self) -> None:
        self._profiler.start()

    def step(self, global_step: int) -> None:
        """Counts a step. Call it after each step."""
        self._num_steps, self._global_step = self._num_steps + 1, global_step
        self._profiler.step()

    def stop(self) -> None:
        self._profiler.stop()
        if not self._is_stored:
            least = NUM_SKIPPED + NUM_WARM_UP + 1
            self._say(f"WARNING: --profile wrote nothing: the run had fewer than {least} steps")

    def _store(self, profiler: torch.profiler.profile) -> None:
        """Called after the last recorded step, and where the run ends before it."""
        num_recorded = self._num_steps - NUM_SKIPPED - NUM_WARM_UP
        if num_recorded < 1:
            return
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))  # for a name that ends in .gz torch compresses twice
            content = gzip.compress(trace.read_bytes())
        name = f"profile/rank-0-step-{self._global_step:06d}.json.gz"
        self._run.folder.create("profile")
        self._run.folder.write(name, content)
        self._is_stored = True
        self._say(f"profile of {num_recorded} steps: {name}, for chrome://tracing or ui.perfetto.dev")
