"""`stage=compare`: every method that fits one backbone, next to each other, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recast_exp.config import keys, recipes, rules
from recast_exp.config.fields import option, range_problem
from recast_exp.config.schema import Config, with_values
from recast_exp.config.variants import Variants
from recast_exp.errors import UserError
from recast_exp.runs.results import Metrics
from recast_exp.stages._base import Job, Stage

if TYPE_CHECKING:
    from recast_exp.experiment.check import Inputs


@dataclass(frozen=True)
class Compare(Stage):
    """What is compared, and how the recipe of each method is chosen."""

    seeds: list[int] = option([42, 1998, 3142592], "seeds")
    draws: list[int] | None = option(None, "draws of training and validation images (dataset.split_seed) to run instead of the seeds")  # fmt: skip # noqa: E501
    more: dict[str, str] = option({}, "further methods: label → overrides, separated by spaces (model=vit_mlp recast.granularity=row)")  # fmt: skip # noqa: E501
    methods: list[str] | None = option(None, "methods by name or glob pattern; null takes all that fit")
    tune: list[str] = option([], "values to try first, key by key (optimizer.lr_scale=0.3,1,3); validation chooses for each method")  # fmt: skip # noqa: E501
    tune_by: str = option("accuracy", "what is compared on the validation images; with few images the loss tells more", choices=("accuracy", "loss"), needs="tune")  # fmt: skip # noqa: E501
    tune_seeds: int = option(
        1, "seeds or draws that each value is tried with; their means are compared", ge=1, needs="tune"
    )

    def problems(self, settings: Config) -> Iterator[str]:
        """Seeds, and each recipe by itself on the configuration."""
        what, count = ("seed", len(self.seeds)) if self.draws is None else ("draw", len(self.draws))
        repeated = "seed" if self.draws is None else "dataset.split_seed"
        repeats = self.seeds if self.draws is None else self.draws
        if again := [value for value in repeats if repeats.count(value) > 1]:
            yield f"stage.{what}s: expected each {what} once, got {again[0]} more than once"
        found = (range_problem(f"stage.{what}s", keys.FIELDS[repeated], each) for each in repeats)
        yield from filter(None, found)
        if self.draws is not None and self.seeds != type(self)().seeds:
            yield f"stage.seeds: expected none beside stage.draws, got {self.seeds}"
        if not count:
            yield f"stage.{what}s: expected at least one {what}, got an empty list"
        elif self.tune_seeds > count:
            yield f"stage.tune_seeds: expected at most the {count} of stage.{what}s, got {self.tune_seeds}"
        elif self.tune_seeds > 1 and not self.tune:
            yield f"stage.tune_seeds: expected 1 without stage.tune, as nothing is tried, got {self.tune_seeds}"
        try:
            choices = recipes.parse(self.tune)
        except UserError as error:
            yield str(error)
            return
        own = set(rules.problems(settings))
        for key, values in choices.items():
            for value in values:
                tried = rules.problems(with_values(settings, {key: value}))
                yield from (f"stage.tune: {problem}" for problem in tried if problem not in own)

    def preflight(self, settings: Config, inputs: Inputs, variants: Callable[[], Variants]) -> None:
        """Names of methods, too."""
        from recast_exp.experiment import comparison

        super().preflight(settings, inputs, variants)
        if self.methods == []:
            raise UserError("stage.methods: expected names of methods, or null for all, got none")
        composed = variants()
        if method := composed.typed("method"):
            raise UserError(
                f"method: expected none with stage=compare, which gives all methods one recipe, got {method}; set "
                "model= and the recipe, or name it in stage.more"
            )
        comparison.select(self.methods, comparison.methods(settings, composed, self.more))

    def no_effect(self, key: str) -> str | None:
        """Nor does the key that it repeats its runs with."""
        if key == ("seed" if self.draws is None else "dataset.split_seed"):
            return f"stage.{'seeds' if self.draws is None else 'draws'} has those that it runs"
        return super().no_effect(key)

    def label(self, method: str) -> str:
        """It has many methods, each with a record of its own."""
        return "comparison"

    def run(self, job: Job) -> Metrics:
        """Run every method with every seed or draw, and set the results next to each other."""
        from recast_exp.experiment import comparison

        seeds = comparison.Repeats("seed", self.seeds)
        return comparison.run(
            job.settings,
            job.folder,
            job.group,
            comparison.methods(job.settings, job.variants(), self.more),
            chosen=self.methods,
            repeats=seeds if self.draws is None else comparison.Repeats("dataset.split_seed", self.draws),
            tuning=comparison.Tuning(recipes.parse(self.tune), self.tune_seeds, self.tune_by),
        )
