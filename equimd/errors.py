"""The one exception that means "the input is wrong"; the CLI turns it into one line and exit code 2."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, the offending value and what is accepted."""
