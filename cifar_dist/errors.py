"""Errors that a user can put right, and how a job shows them."""

import sys
import traceback
from collections.abc import Callable

from cifar_dist import stopping


class UserError(Exception):
    """What was wrong, with which file or value, and what to do: shown without a traceback, on one line.

    A library's message and the name of a file may hold line breaks, and characters that change a terminal.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in super().__str__())


def exit_code_of(main: Callable[[], object], debug: bool) -> int:
    """Runs a job's main; returns 0, 1 for a UserError (one sentence on stderr), 130 for Ctrl-C or 143 for SIGTERM.

    Any other exception is a fault of ours and keeps its traceback; `debug` adds one to a UserError.
    """
    stopping.listen()
    try:
        main()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(stopping.sentence(), file=sys.stderr)
        return stopping.exit_code()
    return 0


def first_line(error: Exception) -> str:
    """The first line of an error's text without the punctuation at its end, to be quoted in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
