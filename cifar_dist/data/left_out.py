"""Pictures and files that are not stored, and why."""

import json
from typing import Any

import numpy as np

from cifar_dist.data.parts import Made, Part
from cifar_dist.data.sources.names import LeftOut, listing
from cifar_dist.data.sources.source import Source
from cifar_dist.errors import UserError
from cifar_dist.storage import Folder
from cifar_dist.uris import join_uri

LEFT_OUT = "_left_out.jsonl"  # in the data set: a line for each; Arrow and Spark skip names that begin with _
BAD = "bad pictures"
MOST_SHOWN = 5  # reasons in a message


def reasons(uri: str) -> list[str]:
    """Returns why pictures of a data set were left out as bad. Raises UserError if the list is damaged."""
    try:
        lines = [json.loads(line) for line in Folder(uri).read(LEFT_OUT).splitlines()]
        return [str(line["reason"]) for line in lines if line["kind"] == BAD]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{join_uri(uri, LEFT_OUT)} is damaged ({error}); prepare the data set again") from error


class BadPictures:
    """Collects the pictures that are left out because they are bad. Refuses to lose more than a share of a class."""

    def __init__(self, source: Source, max_share: float) -> None:
        self._source, self._max_share, self._bad = source, max_share, list[LeftOut]()
        num_classes = len(source.class_names)
        counts = [np.bincount(items["label"].to_numpy(), minlength=num_classes) for items in source.splits.values()]
        self._totals = np.sum(counts, axis=0)
        self._lost = np.zeros(num_classes, int)

    def __len__(self) -> int:
        return len(self._bad)

    def add(self, part: Part, made: Made) -> None:
        """Adds the bad pictures of a part. Raises UserError if a class has lost too many."""
        names = self._source.class_names
        for bad in made.bad:
            label = bad["label"]
            self._lost[label] += 1
            self._bad.append(
                LeftOut(path=bad["path"], kind=BAD, reason=bad["reason"], split=part.split, class_name=names[label])
            )
        over = self._lost > self._max_share * self._totals
        if made.bad and over.any():
            label = int(np.argmax(over))
            reasons = [bad.reason for bad in self._bad if bad.class_name == names[label]]
            lost = f"{self._lost[label]:,} of its {self._totals[label]:,} pictures"
            raise UserError(
                f"class {names[label]!r} would lose {lost}, more than the share of {self._max_share:g} that "
                f"--max-bad-share allows: {listing(reasons, MOST_SHOWN)}; mend them, or raise --max-bad-share"
            )

    def everything(self) -> list[LeftOut]:
        """Returns what is left out: the bad pictures by split and path, then other files."""
        splits = list(self._source.splits)
        return [*sorted(self._bad, key=lambda bad: (splits.index(bad.split), bad.path)), *self._source.left_out]

    def dicts(self) -> list[dict[str, Any]]:
        """Returns everything as JSON objects."""
        return [
            {"kind": out.kind, "path": out.path, "reason": out.reason, "split": out.split, "class": out.class_name}
            for out in self.everything()
        ]

    def lines(self) -> bytes:
        """Returns the content of the file LEFT_OUT."""
        return "".join(json.dumps(out) + "\n" for out in self.dicts()).encode()
