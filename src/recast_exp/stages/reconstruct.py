"""`stage=reconstruct`: Neural Mimicry alone, and how close it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recast_exp.config.schema import Config
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Reconstruct(Stage):
    """It has no options of its own."""

    def problems(self, settings: Config) -> Iterator[str]:
        """It needs templates."""
        if settings.model.method != "recast":
            yield f"stage: expected a RECAST model for reconstruct, got model={settings.model.name} without templates"

    def run(self, job: Job) -> Metrics:
        """Build the bank, and report the errors and similarities of every layer."""
        from recast_exp.experiment import reconstruction

        return reconstruction.run(job.settings, job.folder, job.group)
