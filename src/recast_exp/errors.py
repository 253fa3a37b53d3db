"""The ways a request can fail: it is wrong, or something that it needs is not there.

All derive from `RecastError` and from the built-in exception that fits. The command line shows them as one line
without a traceback. Anything else that is raised is a bug and keeps its traceback.

A library function names the argument (`num_groups: expected …, got …`); the command line adds the section of its key
with `section`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_LONG = 1000
"""Characters that are kept of either end of a line that is too long to be read."""


class RecastError(Exception):
    """A request that cannot be carried out. Its text is one line: what was expected, what was found, what to do.

    Several arguments are several problems; the line names them all.

    Attributes:
        exit_code: Exit code of the command line.
    """

    exit_code = 2

    @property
    def lines(self) -> list[str]:
        """Each problem by itself, on one line."""
        return [_cut(printable(str(problem))) for problem in self.args]

    def __str__(self) -> str:
        # KeyError would show the text in quotes
        return "; ".join(self.lines) or type(self).__name__


class UserError(RecastError, ValueError):
    """An argument, a key or a file that is wrong."""


class UnfitError(UserError):
    """A model and an adapter that do not fit together; a sweep may leave them out (`skip_unfit=true`)."""


class UnknownNameError(UserError, KeyError):
    """A name that stands for nothing: of a layer, an adapter, a solver."""


class MissingInputError(RecastError, FileNotFoundError):
    """Data, weights, a bank or a task file that is not where it was expected."""

    exit_code = 3


class Pruned(Exception):  # noqa: N818 - nothing went wrong
    """Training was stopped by the search that the job is a trial of. One line."""

    def __init__(self, epoch: int, epochs: int, accuracy: float) -> None:
        super().__init__(epoch, epochs, accuracy)  # so that it can be pickled
        self.epoch = epoch
        self.epochs = epochs
        self.accuracy = accuracy

    def __str__(self) -> str:
        return f"pruned after epoch {self.epoch} of {self.epochs} at {100 * self.accuracy:.1f} % validation accuracy"


def printable(text: str) -> str:
    """A text on one line, without what a terminal would obey: names in a file of others may hold anything."""
    return "".join(
        letter if letter.isprintable() else " " if letter.isspace() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _cut(text: str) -> str:
    """A line without its middle, if a value in it is a book."""
    left = len(text) - 2 * _LONG
    return text if left <= 0 else f"{text[:_LONG]}… ({left:,} more characters) …{text[-_LONG:]}"


def one_line(error: object, limit: int | None = None) -> str:
    """The text of an error, all of it on one line; the name of its type where it says nothing.

    Args:
        error: An error, or its text.
        limit: Characters after which it is cut off.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty; the name of its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_integer(name: str, value: object, least: int, below: int | None = None) -> None:
    """Refuse what is no integer in a range.

    Args:
        name: The argument, for the message.
        value: Its value.
        least: The least that is accepted.
        below: The first that is no longer accepted; None for no end.

    Raises:
        UserError: One line.
    """
    sound = isinstance(value, int) and not isinstance(value, bool) and value >= least
    if not sound or (below is not None and isinstance(value, int) and value >= below):
        end = "" if below is None else f" and < {below}"
        raise UserError(f"{name}: expected an integer ≥ {least}{end}, got {value!r}")


def check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuse what is not of a type.

    Args:
        name: The argument, for the message.
        value: Its value.
        kind: The type, or several.
        expected: What is accepted, in words.

    Raises:
        UserError: One line.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}: expected {expected}, got {type(value).__name__}")


@contextlib.contextmanager
def section(prefix: str) -> Iterator[None]:
    """Put `prefix` before each problem of any `RecastError` of the block: `recast.` before `num_groups: …`.

    Args:
        prefix: A section of the configuration with its dot, or a key with its colon (`bank: `).
    """
    try:
        yield
    except RecastError as error:
        raise type(error)(*(f"{prefix}{problem}" for problem in error.args or (error,))) from error
