"""The one exception for input that a user can correct."""


class InputError(ValueError):
    """Input that cannot be used as given.

    The message names the argument, file or configuration key, the value found and the remedy; the command line prints
    it without a traceback and exits with code 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice; on the CPU, PyTorch's is a plain RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
