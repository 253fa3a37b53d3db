"""`stage=report`: one page, and tables, of all runs below a folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report(Stage):
    """It has no options of its own."""

    needs_model: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("path",)
    runs_in_sweep: ClassVar[bool] = False

    def run(self, job: Job) -> Metrics:
        """Write the report of the folder `path` into it; nothing is trained, and nothing but records is read."""
        from recast_exp.report.build import write_report

        log.info("Report: %s", write_report(Path(job.settings.path or "")))
        return {}
