"""`stage=check`: look at a dataset, all of it, and say what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs


@dataclass(frozen=True)
class Check(Stage):
    """It has no options of its own."""

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """As any stage; but images may be missing, as this stage reports them."""
        inputs.check_choice(settings)
        inputs.check(settings, images=False)

    def run(self, job: Job) -> Metrics:
        """Read the index, decode every image, and write the dataset's card."""
        from recast_exp.experiment import inspection

        return inspection.run(job.settings, job.folder, job.group)
