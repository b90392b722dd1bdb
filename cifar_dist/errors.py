"""Errors that a user can fix, and how a job shows them."""

import sys
import traceback
from collections.abc import Callable

from cifar_dist import stopping


class UserError(Exception):
    """An error that names the fault, the file or value, and the remedy. A job prints it on one line, without traceback.

    Messages of libraries and file names may contain line breaks and terminal control characters. str() replaces them.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Returns the text on one line, without control characters, which file names may contain."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def exit_code_of(main: Callable[[], object], debug: bool) -> int:
    """Runs a job's main; returns 0, 1 for a UserError (one sentence on stderr), 130 for Ctrl-C or 143 for SIGTERM.

    Other exceptions are bugs and keep their traceback. `debug` prints a UserError's traceback too.
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
    """Returns the first line of an error's text, without final punctuation, to be quoted in a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:")
