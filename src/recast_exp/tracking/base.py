"""The interface of trackers, and the facts about a run that they receive."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger


@dataclass(frozen=True)
class RunFacts:
    """The facts about a run by which trackers group and filter.

    Attributes:
        method: Its name in tables and plots: "RECAST-Att + MeLo".
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
    config: Mapping[str, object]
    group: str | None = None

    def flat(self) -> dict[str, str | int]:
        """The facts that tell the runs of a project apart, by the names under which trackers keep them."""
        return {name: getattr(self, name) for name in ("method", "model", "adapter", "dataset", "seed")}


class Tracker(Logger):
    """A Lightning logger that also receives the results of a run, and is closed at its end.

    Attributes:
        starts_anew: Whether what it was sent before a run was interrupted is lost, or may be.
    """

    starts_anew = False

    @abstractmethod
    def report(self, run_dir: Path, summary: Mapping[str, object]) -> None:
        """Receive the results of a finished run.

        Args:
            run_dir: Folder of the run, with its plots and its task file.
            summary: Name → result.
        """

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """End the run, so that the next job of this process starts one of its own.

        Args:
            failed: Whether the run ended with an exception.
        """
