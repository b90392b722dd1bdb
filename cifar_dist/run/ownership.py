"""Run ownership: each start (attempt) claims the next number, and earlier attempts may no longer write.

A claim is the file RUN/attempts/NNNNNN-DRIVER.json. The storage needs no locks: the highest (number, driver) is the
owner, and a claimant lists the claims again after writing its own.
"""

import os
import random
import re
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from cifar_dist.errors import UserError
from cifar_dist.sealed_json import from_json, to_json
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

CLAIM = re.compile(r"(\d{6,})-([0-9a-f]{8,})\.json")


@dataclass(frozen=True)
class Attempts:
    """The claims on a run by `driver`, the hex name of one process that starts workers."""

    run: Folder
    driver: str

    def newest(self) -> tuple[int, str]:
        """Returns (number, driver) of the owner, or (0, '') if the run has no claim."""
        found = [match for name in self.run.names("attempts") if (match := CLAIM.fullmatch(name))]
        return max(((int(match[1]), match[2]) for match in found), default=(0, ""))

    def claim(self, takeover: bool) -> int:
        """Claims the run; returns the new attempt's number. Raises UserError if another driver owns it, unless
        `takeover`."""
        while True:
            number, owner = self.newest()
            if owner != self.driver and not takeover:
                self.refuse()
            number += 1
            self.run.create("attempts")
            card = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "time": datetime.now(UTC).isoformat("T", "seconds"),
            }
            self.run.write(f"attempts/{number:06d}-{self.driver}.json", to_json({"attempt": number, **card}))
            mine = [name for name in self.run.names("attempts") if name.startswith(f"{number:06d}-")]
            if len(mine) == 1 and self.newest() == (number, self.driver):
                return number
            time.sleep(random.random() / 5)  # another driver claimed the same number: retry after a random delay

    def check(self, number: int) -> None:
        """Raises UserError unless attempt `number` still owns the run."""
        if self.newest() != (number, self.driver):
            self.refuse()

    def check_driver(self) -> None:
        """Raises UserError if another driver owns the run."""
        if self.newest()[1] not in ("", self.driver):
            self.refuse()

    def refuse(self) -> None:
        number, owner = self.newest()
        if not owner:
            raise UserError(
                f"{join_uri(self.run.uri, 'attempts')} was removed while the run went on, so nothing says any more "
                "that it may write there; nothing more is stored. Run the same command to go on from what is left"
            )
        try:
            card = from_json(self.run.read(f"attempts/{number:06d}-{owner}.json"))
            who = f"by process {card['pid']} on {card['host']} at {card['time']}"
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            who = "by another job"
        raise UserError(
            f"the run {self.run.uri} was taken over as attempt {number} {who}; this older one stops and stores nothing "
            "more. Start a run once only, or give each its own --name"
        )
