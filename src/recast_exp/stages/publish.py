"""`stage=publish`: a task file and its model card, on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.errors import first_line
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Publish(Stage):
    """Where to, and whether it is sent."""

    requires: ClassVar[tuple[str, ...]] = ("task",)
    needs_images: ClassVar[bool] = False
    runs_in_sweep: ClassVar[bool] = False

    repo: str = option("", "repository on the Hub: owner/name")
    dry_run: bool = option(True, "write what would be sent, and send nothing")
    private: bool = option(False, "make a new repository private")

    def problems(self, settings: Config) -> Iterator[str]:
        """The repository."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo, re.ASCII):
            yield f"stage.repo: expected owner/name with stage=publish, got {self.repo or 'nothing'}"
            return
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            yield f"stage.repo: expected owner/name as the Hub takes it, got {self.repo[:99]} ({first_line(error):.99})"

    def run(self, job: Job) -> Metrics:
        """Write the folder; send it, if that is asked for."""
        from recast_exp.experiment import publishing

        return publishing.run(job.settings, job.folder, self.repo, dry_run=self.dry_run, private=self.private)
