"""`stage=reconstruct`: Neural Mimicry alone, and how close it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recast_exp.config.fields import option
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.plugins import SOLVERS
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs

DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Reconstruct(Stage):
    """Whether one bank is made, or banks of several sizes are compared."""

    sweep: bool = option(False, "compare banks of several sizes: error, similarity of the features, accuracy of a solved head")  # fmt: skip # noqa: E501
    sizes: list[int] | None = option(None, "numbers of templates of each group to compare; null is each from 1 to the size of a group", needs="sweep")  # fmt: skip # noqa: E501
    solvers: list[str] = option(["closed_form", "calibrated"], "solvers to compare", needs="sweep")
    dtypes: list[str] = option(
        ["float32"], "dtypes of the templates to compare: float32, bfloat16, int8", needs="sweep"
    )

    def problems(self, settings: Config) -> Iterator[str]:
        """It needs templates, and a comparison those of the layers."""
        if self.sweep and settings.recast.templates != "layers":
            yield f"stage.sweep: expected false with recast.templates={settings.recast.templates}, got true"
        for name, values, known in (
            ("solvers", self.solvers, SOLVERS.names()),
            ("dtypes", self.dtypes, DTYPES),
        ):
            if not values:
                yield f"stage.{name}: expected at least one, got an empty list"
            if unknown := [value for value in values if value not in known]:
                yield f"stage.{name}: expected some of {', '.join(known)}, got {unknown[0]!r}"
        lists: dict[str, list[object]] = {
            "sizes": [*(self.sizes or [])], "solvers": [*self.solvers], "dtypes": [*self.dtypes]
        }  # fmt: skip
        for name, given in lists.items():
            if again := [value for value in given if given.count(value) > 1]:
                yield f"stage.{name}: expected each value once, got {again[0]} more than once"
        if self.sizes == []:
            yield "stage.sizes: expected at least one, or null for all, got an empty list"
        if wrong := [size for size in self.sizes or [] if size < 1]:
            yield f"stage.sizes: expected integers ≥ 1, got {wrong[0]}"
        if settings.model.method != "recast":
            yield f"stage: expected a RECAST model for reconstruct, got model={settings.model.name} without templates"

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """See whether groups have as many layers as the largest bank has templates, too."""
        super().preflight(settings, inputs, variants)
        if self.sweep and self.sizes:
            from recast_exp.experiment import bank_sizes

            bank_sizes.check(settings, self.sizes)

    def run(self, job: Job) -> Metrics:
        """Build the bank, and report the errors and similarities of every layer; or compare several."""
        from recast_exp.experiment import bank_sizes, reconstruction

        if self.sweep:
            grid = bank_sizes.Grid(self.sizes, tuple(self.solvers), tuple(self.dtypes))
            return bank_sizes.run(job.settings, job.folder, grid)
        return reconstruction.run(job.settings, job.folder, job.group)
