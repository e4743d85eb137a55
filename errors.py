"""How does a failure reach the user? One clear message, exit code 2, no traceback unless ``--debug``."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right.

    The message says what is wrong, where, what was expected, what was received and the remedy.
    Every command prints it on one line of standard error and ends with exit code 2.
    """


def run_command(main: Callable[[], None]) -> int:
    """Runs ``main`` and turns a user's mistake into one line on standard error.

    Args:
        main: the command; takes nothing, reads ``sys.argv`` itself.

    Returns:
        The exit code: 0 when ``main`` returned, 2 for a `UserError` or a failing disk, 130 for Ctrl-C.
        Anything else is a bug of ours and keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        sys.stderr.close()
        return 0
    except (UserError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 2
    return 0


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full while writing {error.filename or 'a file'}: "
            "nothing half-written was kept; free some space and run the same command again"
        )
    return str(error)
