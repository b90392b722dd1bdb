"""Items whose reading is noted, waits or kills, for tests of preparations in several processes."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from prepared import png

from cifar_dist.data import sources


def noted(log: str, number: int) -> bytes:
    """The picture; appends its number to the log."""
    with open(log, "a") as file:
        file.write(f"{number}\n")
    return png(number)


def killing(log: str, number: int) -> bytes:
    """Kills its process, but the first time only."""
    if not Path(f"{log}.killed").exists():
        Path(f"{log}.killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return noted(log, number)


def waiting(log: str, number: int) -> bytes:
    """Waits until the file LOG.go is there."""
    while not Path(f"{log}.go").exists():
        time.sleep(0.02)
    return noted(log, number)


def watched(log: Path, num_train: int = 60, **odd: int) -> sources.Source:
    """Pictures of three classes; `odd`: the picture that another function of this module reads, by its name."""
    functions = {number: globals()[name] for name, number in odd.items()}

    def items(split: str, numbers: range) -> list[sources.Item]:
        return [sources.Item(f"{split}/{i}.png", i % 3, partial(functions.get(i, noted), str(log), i)) for i in numbers]

    splits = {"train": items("train", range(num_train)), "test": items("test", range(num_train, num_train + 9))}
    return sources.Source.of("watched", ["a", "b", "c"], splits, identity="watched")
