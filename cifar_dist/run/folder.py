"""A stored run: the folder STORAGE/NAME."""

from dataclasses import dataclass
from typing import Any

from cifar_dist.run.checkpoint import Checkpoint
from cifar_dist.run.checkpoints import Checkpoints
from cifar_dist.run.log import read_lines
from cifar_dist.run.ownership import Attempts
from cifar_dist.sealed_json import from_json, is_sealed, seal, to_json
from cifar_dist.storage import Folder
from cifar_dist.uris import absolute_uri, join_uri

CARD = "config.json"


@dataclass(frozen=True)
class Run:
    """A run by its URI. Storage operations are retried for `retry_seconds` after transient errors."""

    uri: str
    retry_seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", absolute_uri(self.uri))

    @property
    def name(self) -> str:
        return self.uri.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def folder(self) -> Folder:
        return Folder(self.uri, self.retry_seconds)

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.uri, self.retry_seconds)

    def at(self, name: str) -> str:
        """Returns the URI of the file or folder `name` in the run's folder."""
        return join_uri(self.uri, name)

    def attempts(self, driver: str = "") -> Attempts:
        """Returns the claims on the run. `driver` names the process that claims or checks an attempt."""
        return Attempts(self.folder, driver)

    def read_card(self) -> dict[str, Any]:
        """Returns the settings that the run was started with. Raises FileNotFoundError without a card, ValueError if
        the card is damaged."""
        card = from_json(self.folder.read(CARD))
        if not is_sealed(card):
            raise ValueError("it does not match its own checksum")
        return card

    def write_card(self, card: dict[str, Any]) -> None:
        self.folder.write(CARD, to_json(seal(card)))

    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines of the run's log. Raises UserError if the log is damaged."""
        return read_lines(self.folder)

    def best(self) -> Checkpoint | None:
        return self.checkpoints.best()
