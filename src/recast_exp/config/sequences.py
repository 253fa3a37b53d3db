"""How the tasks of a sequence are written: `cub[0:50] dataset.shots=5`."""

from __future__ import annotations

import re
import shlex
from typing import NamedTuple

from recast_exp.errors import UserError

_ENTRY = re.compile(r"(?P<dataset>[\w-]+)(\[(?P<first>\d{0,9}):(?P<last>\d{0,9})\])?(?P<overrides>(\s+.+)?)")


_OF_THE_COMMAND = frozenset({"stage", "task", "path", "resume", "search", "hydra"})


class Entry(NamedTuple):
    """A task as it is written.

    Attributes:
        dataset: Name of a dataset.
        classes: Which of its classes, in their order.
        overrides: Overrides of this task alone.
    """

    dataset: str
    classes: slice
    overrides: tuple[str, ...]


def parse(text: str) -> Entry:
    """Read a task: a dataset, a slice of its classes, and overrides after a space.

    Raises:
        UserError: If it is none.
    """
    found = _ENTRY.fullmatch(text.strip())
    try:
        overrides = shlex.split(found["overrides"]) if found else ["?"]
    except ValueError:
        overrides = ["?"]
    if found is None or not all("=" in each for each in overrides):
        raise UserError(
            f"stage.tasks: expected a dataset such as flowers, 'cub[0:50]' or 'cub dataset.shots=5', got {text!r}"
        )
    for each in overrides:
        if re.split("[.=]", each)[0].lstrip("+~") in _OF_THE_COMMAND:
            raise UserError(f"stage.tasks: expected overrides of a task, got {each!r}, which is the whole command's")
    first, last = (int(found[end]) if found[end] else None for end in ("first", "last"))
    return Entry(found["dataset"], slice(first, last), tuple(overrides))
