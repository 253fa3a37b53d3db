"""`stage=export`: a trained task as a model for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.export import FORMATS
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage


@dataclass(frozen=True)
class Export(Stage):
    """The format, and what its graph takes."""

    requires: ClassVar[tuple[str, ...]] = ("task",)
    needs_images: ClassVar[bool] = False

    format: str = option("timm", "what is written: weights for timm, a graph of ONNX or of torch.export, a folder for Hugging Face", choices=tuple(FORMATS))  # fmt: skip # noqa: E501
    uint8_input: bool = option(False, "onnx: the graph takes uint8 images and normalises them")
    coefficients_input: bool = option(False, "onnx: coefficients and head are inputs, so that one file serves all tasks of a backbone")  # fmt: skip # noqa: E501

    def problems(self, settings: Config) -> Iterator[str]:
        """Options of one format alone."""
        for name in ("uint8_input", "coefficients_input"):
            if getattr(self, name) and self.format != "onnx":
                yield f"stage.{name}: expected false with stage.format={self.format}, got true; it belongs to onnx"
        if self.uint8_input and self.coefficients_input:
            yield "stage.uint8_input: expected false with stage.coefficients_input=true, got true"

    def run(self, job: Job) -> Metrics:
        """Write the model, load it again, and compare."""
        from recast_exp.experiment import exporting

        options = {name: True for name in ("uint8_input", "coefficients_input") if getattr(self, name)}
        return exporting.run(job.settings, job.folder, self.format, options)
