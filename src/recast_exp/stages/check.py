"""`stage=check`: look at a dataset, all of it, and say what is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Check(Stage):
    """It has no options of its own."""

    reads_index: ClassVar[bool] = False  # what is wrong with it is what this stage reports

    def run(self, job: Job) -> Metrics:
        """Read the index, decode every image, and write the dataset's card."""
        from recast_exp.experiment import inspection

        return inspection.run(job.settings, job.folder, job.group)
