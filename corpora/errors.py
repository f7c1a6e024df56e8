"""Errors for the person who meets them: what, where, expected and got, what to do; one line each.

PilelineError
├── InputError      the same call fails the same way: fix the input, then run again
└── Unavailable     the world was in the way (network, server, disk): trying again may help
"""

import errno
import os
import sys
from collections.abc import Callable

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_INPUT = 2
EXIT_UNAVAILABLE = 75  # EX_TEMPFAIL of sysexits.h


class PilelineError(Exception):
    """An expected failure, told in one line."""

    exit_code = EXIT_INPUT


class InputError(PilelineError):
    """A fault that a retry cannot mend."""


class Unavailable(PilelineError):
    """A fault that may be gone on the next attempt."""

    exit_code = EXIT_UNAVAILABLE


def of_the_system(error: OSError) -> PilelineError:
    """Say what the operating system refused, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in NO_SPACE:
        cure = "free some space, or set PILELINE_DATA and PILELINE_RUNS to a larger disk, then run again"
        return InputError(f"{where}no space left on the disk; {cure}")
    if isinstance(error, (IsADirectoryError, NotADirectoryError)):
        return InputError(
            f"{where}{error.strerror}; a file and a folder have changed places: remove what is wrong"
        )
    return Unavailable(f"{where}{error.strerror or error}")


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command-line `main` and leave the process: a `PilelineError` is one line, never a traceback."""
    try:
        sys.exit(main() or 0)
    except PilelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fault = of_the_system(error)
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
