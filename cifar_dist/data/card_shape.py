"""The fields of a stored data card and the kinds of their values."""

from typing import Any, NamedTuple


class Each(NamedTuple):
    """A dict from any names to values of one shape."""

    shape: Any


class Maybe(NamedTuple):
    """A value of a shape, or null."""

    shape: Any


PICTURE = {"path": str, "split": str, "class": str}
PAIR = (PICTURE, PICTURE)
SPREAD = {"min": float, "median": float, "max": float}
SIZE = {"width": int, "height": int, "num_pictures": int}
SPLIT = {
    "num_rows": int,
    "num_rows_per_class": [int],
    "share_per_class": [float],
    "empty_classes": [str],
    "imbalance": float,
    "width": SPREAD,
    "height": SPREAD,
    "num_sizes": int,
    "common_sizes": [SIZE],
    "aspect_ratio": SPREAD,
    "num_bytes": int,
    "formats": Each(int),
    "num_stored_as_png": int,
    "num_with_transparency": int,
}
COPIES = {"num_groups": int, "num_pictures": int, "examples": [PAIR]}
ALIKE = {"num_pairs": int, "num_pictures": int, "share": float, "examples": [{"distance": int, "pictures": PAIR}]}
BETWEEN = {"split": str, "other": str}
KIND = {"kind": str, "num_files": int, "examples": [{"path": str, "reason": str}]}
SHAPE = {
    "format_version": int,
    "source": str,
    "layout": str,
    "drawn": [str],
    "manifest_sha256": str,
    "made_of": str,
    "class_names": [str],
    "splits": Each(SPLIT),
    "duplicates": {
        "num_compared": int,
        "num_pictures": int,
        "within": Each(COPIES),
        "across": [{**BETWEEN, **COPIES, "share": float}],
        "contradictory": COPIES,
    },
    "near_duplicates": Maybe(
        {
            "distance": int,
            "num_compared": int,
            "num_plain": int,
            "num_bounded": int,
            "within": Each(ALIKE),
            "across": [{**BETWEEN, **ALIKE}],
        }
    ),
    "left_out": {"num_files": int, "kinds": [KIND]},
    "warnings": [str],
}


def check_shape(value: Any, shape: Any, name: str = "the card") -> None:
    """Raises ValueError unless a value has a shape.

    Shapes are types, {key: shape} with exactly these keys, [shape] for a list of any length, a tuple of shapes for a
    list of that length, Each and Maybe. An int is 0 or more.
    """
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, Maybe):
        is_right, parts = True, [(value, shape.shape, name)] * (value is not None)
    elif isinstance(shape, Each):
        is_right = type(value) is dict
        parts = [(item, shape.shape, key) for key, item in value.items()] if is_right else []
    elif isinstance(shape, dict):
        is_right = type(value) is dict and value.keys() == shape.keys()
        parts = [(value[key], shape[key], key) for key in shape] if is_right else []
    elif isinstance(shape, tuple):
        is_right = type(value) is list and len(value) == len(shape)
        parts = [(item, part, name) for item, part in zip(value, shape, strict=True)] if is_right else []
    elif isinstance(shape, list):
        is_right = type(value) is list
        parts = [(item, shape[0], name) for item in value] if is_right else []
    else:
        is_right = type(value) is shape and not (shape is int and value < 0)
    if not is_right:
        raise ValueError(f"{name} is not as prepare writes it")
    for part in parts:
        check_shape(*part)
