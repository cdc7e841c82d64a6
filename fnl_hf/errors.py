"""Errors that a user can mend."""


class UserInputError(ValueError):
    """A file, flag, configuration or checkpoint that cannot be used.

    The message names the thing, the bound and the value; the scripts print it as one line, without a traceback, and
    exit with status 2.
    """
