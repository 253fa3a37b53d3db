"""A tracker, and what it is told of the run that it follows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


@dataclass(frozen=True)
class RunFacts:
    """What a run is, for trackers to group and filter by.

    Attributes:
        method: What tables and plots call it: "RECAST-Att + MeLo".
        model: The option of `model=`.
        adapter: The option of `adapter=`; "none" without one.
        dataset: The option of `dataset=`.
        seed: Its seed.
        stage: The option of `stage=`.
        config: The whole configuration, resolved, as nested plain values.
        group: The last two parts of the folder of its sweep; None for a run by itself.
    """

    method: str
    model: str
    adapter: str
    dataset: str
    seed: int
    stage: str
    config: Mapping[str, Any]
    group: str | None = None

    def flat(self) -> dict[str, Any]:
        """What tells runs of one project apart, by the names under which trackers keep it."""
        return {name: getattr(self, name) for name in ("method", "model", "adapter", "dataset", "seed")}


class Tracker(Logger):
    """A logger of Lightning's that also takes the results of a run, and its end."""

    @abstractmethod
    def report(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Take the results of a finished run.

        Args:
            run_dir: Folder of the run, with its plots and its task file.
            summary: Name → result.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run, so that the next job of this process starts one of its own.

        Args:
            failed: Whether an exception has ended it.
        """
