"""The exceptions whose message is one line for the user; the CLI prints it and exits with 2 or 1."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, the offending value and what is accepted."""


class FailedError(RuntimeError):
    """Work that could not be finished: the message is one line that says what happened and how to go on."""
