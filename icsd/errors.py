"""The one exception for input that a user can correct."""


class InputError(ValueError):
    """Input that cannot be used as given.

    The message names the argument, file or configuration key, the value found and the remedy; the command line prints
    it without a traceback and exits with code 2.
    """
