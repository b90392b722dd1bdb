"""Errors that a user can put right, and how a job shows them."""

import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """What was wrong, with which file or value, and what to do: shown without a traceback."""


def exit_code_of(main: Callable[[], object], debug: bool) -> int:
    """Runs a job's main; returns 0, 1 for a UserError (one sentence on stderr) or 130 for Ctrl-C.

    Any other exception is a fault of ours and keeps its traceback; `debug` adds one to a UserError.
    """
    try:
        main()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from what is stored", file=sys.stderr)
        return 130
    return 0
