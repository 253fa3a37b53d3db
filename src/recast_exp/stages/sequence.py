"""`stage=sequence`: one task after another on one backbone, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recast_exp.config import sequences
from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.errors import UserError
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs

BASELINES = ("separate", "fine-tuning", "joint")
ALL_BASELINES = ("lae", *BASELINES)


@dataclass(frozen=True)
class Sequence(Stage):
    """Which tasks, what training starts from, and what is set next to them."""

    reads_index: ClassVar[bool] = False  # each task has a dataset of its own

    tasks: list[str] = option([], "datasets in order, each with a slice of its classes (cub[0:50]) and overrides (flowers dataset.shots=5)")  # fmt: skip # noqa: E501
    splits: int | None = option(None, "divide the classes of the one dataset into this number of tasks", ge=2)
    start_from: str = option("zero", "coefficients that the next task starts from: the pretrained ones, the mean of the earlier tasks, or those of the earlier task that fits best", choices=("zero", "mean", "task"))  # fmt: skip # noqa: E501
    baselines: list[str] = option(list(BASELINES), "what is trained for comparison: lae (the method with the same parameters for all tasks, and their mean), separate (full fine-tuning of a model for each task), fine-tuning (one model, task after task), joint (all classes at once)")  # fmt: skip # noqa: E501
    unknown: bool = option(True, "also score images whose task is not known")
    random_features: int = option(2000, "random features of RanPAC, where the task is not known", ge=1, needs="unknown")

    def problems(self, settings: Config) -> Iterator[str]:
        """The tasks, and methods whose tasks share a backbone."""
        for entry in self.tasks:
            try:
                sequences.parse(entry)
            except UserError as error:
                yield str(error)
        if self.splits is None and len(self.tasks) < 2:
            yield f"stage.tasks: expected at least two tasks, or stage.splits, got {self.tasks}"
        if self.splits is not None and len(self.tasks) > 1:
            yield f"stage.splits: expected null with several stage.tasks, got {self.splits}"
        if unknown := [name for name in self.baselines if name not in ALL_BASELINES]:
            yield f"stage.baselines: expected some of {', '.join(ALL_BASELINES)}, got {unknown[0]!r}"
        if settings.model.method == "full":
            yield (
                "model.method: expected recast or frozen with stage=sequence, whose tasks share a backbone, got full; "
                "stage.baselines=[fine-tuning] trains every weight"
            )
        if settings.trainer.devices != 1:
            yield f"trainer.devices: expected 1 with stage=sequence, got {settings.trainer.devices}"
        if self.start_from != "zero" and settings.model.method != "recast":
            yield f"stage.start_from: expected zero without coefficients, got {self.start_from}"
        elif self.start_from != "zero" and settings.recast.templates != "layers":
            yield (
                f"stage.start_from: expected zero with recast.templates={settings.recast.templates}, whose "
                f"coefficients have no relative form, got {self.start_from}"
            )

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """Compose the tasks, too, and divide the classes of their datasets."""
        from recast_exp.experiment.sequence_tasks import check_tasks

        super().preflight(settings, inputs, variants)
        check_tasks(settings, variants(), self.tasks, self.splits)

    def run(self, job: Job) -> Metrics:
        """Train the tasks in order, and test all earlier ones after each."""
        from recast_exp.experiment import sequence
        from recast_exp.experiment.sequence_tasks import tasks_of

        tasks = tasks_of(job.settings, job.variants(), self.tasks, self.splits)
        plan = sequence.Plan(self.start_from, tuple(self.baselines), self.random_features if self.unknown else None)
        return sequence.run(job.settings, job.folder, job.group, tasks, plan)
