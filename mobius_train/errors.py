"""The one error type that a person is meant to read."""


class MobiusError(Exception):
    """A mistake in the input, the configuration or the data that the user can mend.

    The message says what is wrong, where, and what to do. Entry points print it without a
    traceback and exit with a non-zero status.
    """
