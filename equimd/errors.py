"""The exceptions and warnings whose message is one line; the CLI prints it, exits with 2 or 1 for an exception."""

import textwrap


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, the offending value and what is accepted."""


class FailedError(RuntimeError):
    """Work that could not be finished: the message is one line that says what happened and how to go on."""


def in_one_line(error: BaseException) -> str:
    """An exception of anybody's as one line of at most 300 characters: its kind and what it says."""
    return textwrap.shorten(f"{type(error).__name__}: {error or 'no message'}", 300, placeholder=" …")


class KernelWarning(RuntimeWarning):
    """Compiled kernels are wrong or missing here, and slower ones take their place."""


class NameWarning(UserWarning):
    """A name could mean two things; the message says which one was taken and how to write the other."""
