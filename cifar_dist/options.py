"""Declares settings as dataclass fields with type, default, range and help. Knows no particular setting."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import field
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

from cifar_dist.errors import UserError


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str = "",
    aliases: tuple[str, ...] = (),
    parse: Callable[[Any], Any] | None = None,
    common: bool = False,
    may_change: bool = False,
) -> Any:
    """Returns a dataclass field for a setting. Without a default the setting is required.

    `parse` converts the given value, and raises ValueError. `common`: the short help shows the setting.
    `may_change`: a resumed run may change the setting.
    """
    values = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "metavar": metavar}
    flags = {"aliases": aliases, "parse": parse, "common": common, "may_change": may_change}
    return field(default=default, metadata={**values, **flags})


def nearest(word: str, valid: Iterable[Any]) -> str:
    """Returns ' (did you mean X?)' for the valid word closest to `word`, or '' if none is close."""
    close = difflib.get_close_matches(str(word), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f: dataclasses.Field) -> tuple[type, bool, bool]:
    """Returns (type of a value, whether None is allowed, whether the setting is a list of values)."""
    kind: Any = f.type
    is_optional = isinstance(kind, UnionType)
    if is_optional:
        kind = next(one for one in get_args(kind) if one is not type(None))
    is_list = get_origin(kind) is tuple
    return (get_args(kind)[0] if is_list else kind), is_optional, is_list


class Section:
    """Base of the sections. Building a section checks type, choices and range of each setting.

    `table`: the section's name in a config file. `heading`: its name in the help. `by_recipe`: a recipe sets its
    values.
    """

    table: ClassVar[str] = ""
    heading: ClassVar[str] = ""
    by_recipe: ClassVar[bool] = False
    range_words: ClassVar[tuple[str, str]] = "must be", ""  # before a range, and before 'N or more'

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if f.metadata:
                object.__setattr__(self, f.name, checked(f, getattr(self, f.name), self.range_words))


def checked(f: dataclasses.Field, value: Any, range_words: tuple[str, str] = Section.range_words) -> Any:
    """Returns the value in the setting's type. Raises UserError if the setting does not accept it."""
    (kind, is_optional, is_list), flag = kind_of(f), flag_of(f.name)
    if is_optional and value is None:
        return None
    if not is_list:
        return checked_one(f, value, kind, range_words)
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{flag} takes one or more values, not {value!r}")
    return tuple(checked_one(f, one, kind, range_words) for one in value)


def checked_one(f: dataclasses.Field, value: Any, kind: Any, range_words: tuple[str, str]) -> Any:
    flag, choices = flag_of(f.name), f.metadata["choices"]
    if parse := f.metadata["parse"]:
        try:
            value = parse(value)
        except ValueError as error:
            raise UserError(f"{flag}: {error}") from None
        except TypeError:
            raise UserError(f"{flag} takes a value of type {kind.__name__}, not {value!r}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{flag} takes a value of type {kind.__name__}, not {value!r}")
    if choices and value not in choices:
        raise UserError(f"{flag} is one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}")
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    before, of = range_words
    is_finite, has_range = kind is not float or math.isfinite(value), low is not None or high is not None
    if not is_finite and (of or not has_range):
        raise UserError(f"{flag} takes a value that is finite, not {value}")
    if not is_finite or (low is not None and value < low) or (high is not None and value > high):
        least, most = (f"{b:g}" if isinstance(b, float) else b for b in (low, high))
        bounds = f"from {least} to {most}" if high is not None else f"{of}{least} or more"
        raise UserError(f"{flag} {before} {bounds}, not {value}")
    return value
