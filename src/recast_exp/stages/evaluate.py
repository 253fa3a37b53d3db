"""`stage=evaluate`: put a task file onto its backbone and repeat the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Evaluate(Stage):
    """It has no options of its own."""

    requires: ClassVar[tuple[str, ...]] = ("task",)

    def run(self, job: Job) -> Metrics:
        """Test a task file; the settings already hold what the file says of itself."""
        from recast_exp.experiment import evaluation

        return evaluation.run(job.settings, job.folder, job.group)
