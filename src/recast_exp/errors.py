"""The ways a user's request can fail: it is wrong, or something it needs is not there.

All are shown as one line without a traceback. Anything else that is raised is a bug and keeps its traceback.
"""


class UserError(Exception):
    """A request that cannot be carried out as written. One line: the key, what it got, what it takes, what to do."""

    exit_code = 2


class UnfitError(UserError):
    """A model and an adapter that do not go together; a sweep may leave them out (`skip_unfit=true`)."""


class MissingInputError(UserError):
    """Data, weights, a bank or a task file that is not where the configuration says."""

    exit_code = 3
