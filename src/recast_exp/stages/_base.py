"""What a stage is: its options, what it needs, and what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from recast_exp.config.fields import unmet
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.runs.results import Metrics

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs


_OF_TRAINING = "optimizer", "scheduler", "training", "head", "select", "trainer.max_epochs", "trainer.early_stopping"


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
        reads_index: Whether the index of its dataset is read before a folder is made, too.
        requires: Keys of `task`, `path` and `resume` that have to be set.
        several_tasks: Whether `task` may name several files.
        accepts: Those that may be set.
        runs_in_sweep: Whether it may be a job of a sweep.
    """

    needs_model: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True
    reads_index: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()
    several_tasks: ClassVar[bool] = False
    accepts: ClassVar[tuple[str, ...]] = ()
    runs_in_sweep: ClassVar[bool] = True

    def problems(self, settings: Config) -> Iterator[str]:
        """What is wrong with a command of this stage, beyond what is wrong with any. One line each.

        Raises:
            RecastError: What is missing, or cannot be read.
        """
        return iter(())

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """Read what a command needs, before a folder is made for it; may import what is heavy.

        Args:
            settings: The settings of a job.
            inputs: Reads files, each once for all jobs.
            variants: Makes what composes the same command with other options.

        Raises:
            RecastError: What is wrong or missing.
        """
        inputs.check(settings, images=self.needs_images and self.reads_index)

    def label(self, method: str) -> str:
        """The name of its job in lists and records, given the label of its method."""
        return method

    def no_effect(self, key: str) -> str | None:
        """Why it does not matter that a key was typed; None where it may matter."""
        if key.startswith("stage.") and (needed := unmet(self, key.removeprefix("stage."))):
            return f"stage.{needed} is not set"
        if "task" in self.requires and key.startswith(_OF_TRAINING):
            return "nothing is trained"
        return None

    @abstractmethod
    def run(self, job: Job) -> Metrics:
        """Do it; the metrics, flat.

        Raises:
            RecastError: If the request cannot be carried out.
        """
