"""Errors a user can cause: one line that names the file or option, what was found, and what to do."""


class UserError(Exception):
    """Something the user can mend. The message is a single line; the command line prints it without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A wrong option or configuration key: the command line ends with exit code 2."""

    exit_code = 2
