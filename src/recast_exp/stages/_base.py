"""What a stage is: its options, what it needs, and what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.runs.results import Metrics


@dataclass(frozen=True)
class Job:
    """What a stage is run with.

    Attributes:
        settings: The settings.
        folder: Folder of the run; it exists.
        group: Folder of the sweep that the run belongs to; None for a single run.
        variants: Makes what composes the same command with other options.
    """

    settings: Config
    folder: Path
    group: str | None
    variants: Callable[[], Variants]


@dataclass(frozen=True)
class Stage(ABC):
    """A stage. The fields of a subclass are its options; the class says what it needs of a command.

    A module of this package, or of an entry point, defines one. It imports torch and all that is heavy within `run`, so
    that a wrong command is reported at once.

    Attributes:
        needs_model: Whether it needs a backbone, whose files are then checked before it runs.
        needs_images: Whether it needs a dataset, which is then checked as well.
        requires: Keys of `task`, `path` and `resume` that have to be set.
        accepts: Those that may be set.
        runs_in_sweep: Whether it may be a job of a sweep.
    """

    needs_model: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = ()
    runs_in_sweep: ClassVar[bool] = True

    def problems(self, settings: Config) -> Iterator[str]:
        """What is wrong with a command of this stage, beyond what is wrong with any. One line each.

        Raises:
            RecastError: What is missing, or cannot be read.
        """
        return iter(())

    @abstractmethod
    def run(self, job: Job) -> Metrics:
        """Do it; the metrics, flat.

        Raises:
            RecastError: If the request cannot be carried out.
        """
