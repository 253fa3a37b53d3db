"""The states of a job: one vocabulary for job files, searches, terminal tables and reports."""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """How far a job is, or how it ended. The values are those of `job.json` and `search.json`."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    SKIPPED = "skipped"
    """Left out of a sweep because it does not fit."""
    INTERRUPTED = "interrupted"
    PRUNED = "pruned"
    """A trial that its search has stopped early."""
    WAITING = "waiting"
    """Planned and not begun."""
    DAMAGED = "damaged"
    """It says that it has finished, or nothing readable, and a file cannot be read."""

    @classmethod
    def of(cls, text: str, reason: str | None = None) -> State:
        """The state that a file records, in the words of this version or of an earlier one.

        Args:
            text: The recorded state.
            reason: The recorded reason. Earlier versions recorded a pruned trial as skipped, and why.

        Raises:
            ValueError: If the text is no state of any version.
        """
        state = cls(_EARLIER.get(text, text))
        return cls.PRUNED if state is cls.SKIPPED and (reason or "").startswith("pruned after") else state


_EARLIER = {"not started": State.WAITING, "not begun": State.WAITING}
