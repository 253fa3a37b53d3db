"""`stage=adapt`: mimic, inject, train, test, and write everything down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Adapt(Stage):
    """It has no options of its own."""

    accepts: ClassVar[tuple[str, ...]] = ("resume",)

    def run(self, job: Job) -> Metrics:
        """Adapt a backbone to a dataset."""
        from recast_exp.experiment import adaptation

        return adaptation.run(job.settings, job.folder, job.group)
