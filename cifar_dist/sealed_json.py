"""JSON files with a fixed layout, checked when read, and sealed with their own checksum."""

import hashlib
import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """Returns nested dicts and lists with None for numbers that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> bytes:
    """Returns readable JSON with a fixed layout, so that equal values give equal bytes."""
    return (json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


MOST_LEVELS = 50  # of nested JSON; the project's own files have only a few


def from_json(content: bytes | str) -> dict[str, Any]:
    """Returns the JSON object in a file's content.

    Raises ValueError for content that `to_json` does not write: a value that is no object, NaN or an infinity, a number
    of more than 64 bits, or text that is not Unicode. Also raises it for nesting that would exhaust the stack.
    """
    try:
        found = json.loads(content, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    level: list[Any] = [found]
    for _ in range(MOST_LEVELS):
        level = [inner for value in level for inner in checked_value(value)]
        if not level:
            return found
    raise ValueError("it is nested too deep")


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object as a dict. Raises ValueError for a key that is there twice: one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def checked_value(value: Any) -> list[Any]:
    """Checks a value and returns the values nested directly in it. Raises ValueError like from_json."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it has the number {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise ValueError("it has a number of more than 64 bits")
    return []


def is_texts(value: object) -> bool:
    """Whether a value is a list of strings."""
    return type(value) is list and all(type(item) is str for item in value)


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with `sha256`, the checksum of all other values, so that later changes are detected."""
    return {**values, "sha256": hashlib.sha256(to_json({**values, "sha256": ""})).hexdigest()}


def is_sealed(values: dict[str, Any]) -> bool:
    """Whether the values match their seal."""
    return seal(values) == values
