"""`stage=merge`: several task files on one set of templates, from which each can be had again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.runs.results import Metrics
from recast_exp.runs.task_header import task_files
from recast_exp.stages._base import Job, Stage

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs


@dataclass(frozen=True)
class Merge(Stage):
    """How many templates the tasks share."""

    requires: ClassVar[tuple[str, ...]] = ("task",)
    several_tasks: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False
    runs_in_sweep: ClassVar[bool] = False

    rank: int | None = option(None, "templates of each layer; null is the number of tasks, with which each comes back exactly", ge=1)  # fmt: skip # noqa: E501

    def problems(self, settings: Config) -> Iterator[str]:
        """At least two tasks, and no more templates than tasks."""
        files = task_files(settings.task or "")
        count = len(files)
        again = [path for path, number in Counter(path.resolve() for path in files).items() if number > 1]
        if count < 2:
            yield f"task: expected at least two task files ([FILE,FILE]) with stage=merge, got {count}"
        elif again:
            yield f"task: expected each task file once with stage=merge, got {again[0]} more than once"
        elif self.rank is not None and self.rank > count:
            yield f"stage.rank: expected at most {count}, the number of tasks, got {self.rank}"

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """See what each task has changed, too."""
        from recast_exp.experiment import merging

        super().preflight(settings, inputs, variants)
        merging.check(settings)

    def run(self, job: Job) -> Metrics:
        """Merge the tasks, and report how much they are in each other's way."""
        from recast_exp.experiment import merging

        return merging.run(job.settings, job.folder, self.rank)
