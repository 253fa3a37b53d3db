"""`stage=predict`: the classes of images, with one task or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.data.listing import images_at
from recast_exp.runs.results import Metrics
from recast_exp.runs.task_header import read_record, task_files
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Predict(Stage):
    """Which images, and what is written of them."""

    requires: ClassVar[tuple[str, ...]] = ("task",)
    several_tasks: ClassVar[bool] = True
    needs_images: ClassVar[bool] = False

    images: str = option("", "folder, pattern (photos/**/*.jpg), list of paths (.txt) or image")
    top: int = option(5, "classes that are written for an image, the most probable first", ge=1)
    batch_size: int = option(64, "images that are computed at once", ge=1)
    sheet: int = option(32, "images on the contact sheet", ge=1)

    def problems(self, settings: Config) -> Iterator[str]:
        """The images, and the task files after the first.

        Raises:
            MissingInputError: If there are no images, or no such task file.
            UserError: If a task file is damaged.
        """
        if not self.images:
            yield "stage.images: expected a folder, a pattern, a list (.txt) or an image, got nothing"
        else:
            next(images_at(self.images))
        for path in task_files(settings.task or "")[1:]:
            read_record(path)

    def run(self, job: Job) -> Metrics:
        """Predict all images, or go on where an earlier run was stopped."""
        from recast_exp.experiment import prediction

        asked = prediction.Asked(self.images, self.top, self.batch_size, self.sheet)
        return prediction.run(job.settings, job.folder, asked)
