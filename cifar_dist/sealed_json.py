"""JSON files with a fixed layout, read with checks, and sealed by a checksum of their own."""

import hashlib
import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """The nested dicts and lists with None for numbers that are not finite, for which JSON has no name."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> bytes:
    """Readable JSON with a fixed layout, so that equal values give equal bytes."""
    return (json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


MOST_LEVELS = 50  # of nested JSON; what the project writes has a handful


def from_json(content: bytes | str) -> dict[str, Any]:
    """The JSON object in a file that is read back.

    Raises ValueError for what `to_json` does not write: another kind of value, NaN and the infinities, numbers of more
    than 64 bits, text that is not Unicode, and nesting that would exhaust the stack.
    """
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    level: list[Any] = [found]
    for _ in range(MOST_LEVELS):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                value.encode()
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"it has the number {value}")
            elif isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise ValueError("it has a number of more than 64 bits")
        level = inner
        if not level:
            return found
    raise ValueError("it is nested too deep")


def is_texts(value: object) -> bool:
    """Whether a value that was read back is a list of texts."""
    return type(value) is list and all(type(item) is str for item in value)


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """The values with `sha256`, that of all the others: what is read back can be told from what was changed."""
    return {**values, "sha256": hashlib.sha256(to_json({**values, "sha256": ""})).hexdigest()}


def is_sealed(values: dict[str, Any]) -> bool:
    """Whether values that were read back are those that were sealed."""
    return seal(values) == values
