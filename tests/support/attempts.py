"""Calls with hostile inputs, which have to end in a result or in one line of an error."""

import time

from icsd.errors import InputError

SECONDS = 10  # of processor time for one input


def attempt(function, *arguments):
    """Call a function; return "read" or "refused". Any other exception, several lines, or a long time fails."""
    since = time.process_time()
    try:
        function(*arguments)
        outcome = "read"
    except InputError as error:
        outcome = "refused" if str(error).isprintable() else repr(str(error))
    assert outcome in ("read", "refused")
    assert time.process_time() - since < SECONDS
    return outcome
