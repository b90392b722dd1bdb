"""Nested dicts and lists, such as the states of optimizers."""

from collections.abc import Callable
from typing import Any


def mapped(tree: Any, kind: type, action: Callable[[Any], Any]) -> Any:
    """Returns nested dicts and lists with `action` applied to every value of the type `kind`."""
    if isinstance(tree, kind):
        return action(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, kind, action) for key, value in tree.items()}
    return [mapped(value, kind, action) for value in tree] if isinstance(tree, list) else tree
