"""A stand-in for check.py's child: some files end it, some make it hang."""

import os
import signal
import time

from cifar_dist.data import check

CRASH, HANG, POISON = b"crash", b"hang", b"poison"  # the last one ends it with the picture after it


class CrashingDecoder(check.Decoder):
    is_poisoned = False

    def sound(self, pictures: list[check.Picture[None]]) -> bytes:
        for picture in pictures:
            if picture.encoded.endswith(CRASH) or self.is_poisoned:
                os.kill(os.getpid(), signal.SIGSEGV)
            if picture.encoded.endswith(HANG):
                time.sleep(600)
            self.is_poisoned = picture.encoded.endswith(POISON)
        return super().sound(pictures)


def serve(descriptor: int, num_threads: int) -> None:
    check.Decoder = CrashingDecoder
    check.serve(descriptor, num_threads)
