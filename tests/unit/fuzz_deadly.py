"""What the fuzz test must call a failure: each area is a fault that a reading might have."""

import os
import signal
import time
from pathlib import Path
from random import Random

import fuzzing
from fuzzing import Group, outcome

from cifar_dist.errors import UserError


class Deadly(Group):
    areas = ("sound", "signal", "hang", "memory", "exception", "elsewhere")

    def sound(self, _random: Random, _copy: Path) -> None:
        def refuse() -> None:
            raise UserError("a sentence")

        outcome(refuse)

    def signal(self, _random: Random, _copy: Path) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self, _random: Random, _copy: Path) -> None:
        time.sleep(60)

    def memory(self, _random: Random, _copy: Path) -> None:
        bytearray(b"x" * (2 * fuzzing.CASE_BYTES))

    def exception(self, _random: Random, _copy: Path) -> None:
        outcome(lambda: {}["missing"])

    def elsewhere(self, _random: Random, _copy: Path) -> None:
        (self.outside / "outside.txt").write_text("another's")


def make(folder: Path) -> Group:
    fuzzing.CASE_SECONDS, fuzzing.CASE_BYTES = 2, 100 << 20
    return Deadly(folder)
