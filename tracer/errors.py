"""The exceptions a user can meet and the exit code each one ends with.

Every message is one line: what failed, on what, and the remedy. ``cli.main`` is the only place that
catches them; the library raises and never prints or exits.
"""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_UNABLE = 4
EXIT_DATA_LOST = 5


class StallscopeError(Exception):
    """Something failed for a reason the user can act on; ``str()`` is the one line to print."""

    exit_code = EXIT_FAILED


class UsageError(StallscopeError):
    """The request itself is wrong: an option, a duration, a file that is not a recording."""

    exit_code = EXIT_USAGE


class SurroundingsError(StallscopeError):
    """This machine, process or binary cannot be traced as asked; the message names the remedy."""

    exit_code = EXIT_UNABLE


class TargetError(SurroundingsError):
    """The process is not there, is not a Redis server, or went away."""


class SymbolError(SurroundingsError):
    """A function cannot be found or probed in a binary, or the binary cannot be read."""


class RecordingError(UsageError):
    """A file is not a recording, is of an unknown version, or is damaged beyond reading."""
