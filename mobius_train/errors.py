"""How a run ends before its end: the error type that a person is meant to read, and the stop that was asked for."""


class MobiusError(Exception):
    """A mistake in the input, the configuration or the data that the user can mend.

    The message says what is wrong, where, and what to do. Entry points print it without a
    traceback and exit with a non-zero status.
    """


class Stopped(Exception):
    """The run was asked to stop, and did, after a checkpoint; it goes on from there when it is started again.

    Entry points exit with `os.EX_TEMPFAIL`, 75.
    """
