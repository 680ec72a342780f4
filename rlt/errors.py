"""What a user did that cannot work, and how a command that cannot go on ends."""

import os
import sys
from typing import NoReturn

USAGE_CODE = 2  # of a command line that cannot be read


class Refused(ValueError):
    """A request that cannot work: its message is one line with the bad value and the remedy."""


def usage(text: str) -> NoReturn:
    """A command that was called without what it needs says how to call it, and ends with the code of `argparse`."""
    sys.stderr.write(f"{text}\n")
    sys.exit(USAGE_CODE)


def fail(error: Exception, code: int = 1) -> NoReturn:
    """One clear line; the traceback only on request."""
    if os.environ.get("RLT_TRACEBACK"):
        raise error
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    sys.exit(code)
