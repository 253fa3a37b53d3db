"""Recipes to choose among, written as the values of a sweep are: `optimizer.lr_scale=0.3,1,3`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hydra.errors import HydraException

from recast_exp.config import grammar, keys
from recast_exp.errors import UserError

SECTIONS = "optimizer", "scheduler", "trainer"
ALSO = "dataset.transform", "dataset.batch_size"


@dataclass(frozen=True)
class Trial:
    """A recipe, and how it validated."""

    recipe: dict[str, object]
    accuracy: float
    loss: float


@dataclass
class Search:
    """What has been tried.

    Attributes:
        by: What makes a recipe the best: the highest "accuracy" or the lowest "loss"; the other decides between equals.
            An accuracy moves in steps of an image; where those are few, the loss tells recipes apart that it does not.
    """

    trials: list[Trial] = field(default_factory=list)
    by: str = "accuracy"

    @property
    def best(self) -> Trial:
        """The first of the best."""
        by_accuracy = self.by == "accuracy"
        return max(self.trials, key=lambda t: (t.accuracy, -t.loss) if by_accuracy else (-t.loss, t.accuracy))

    @property
    def recipe(self) -> dict[str, object]:
        """That of the best; empty, so that nothing is changed, where there was nothing to try."""
        return self.best.recipe if self.trials else {}


def parse(texts: Sequence[str]) -> dict[str, list[object]]:
    """Key → values to try.

    Raises:
        UserError: If a text is not `key=value,value`, or the key is none of a recipe, or it does not take a value.
    """
    found: dict[str, list[object]] = {}
    for text in texts:
        override = grammar.parse(text)
        if override is None or "=" not in text or override.is_delete():
            raise UserError(f"stage.tune: expected key=value,value,… (optimizer.lr_scale=0.3,1,3), got {text!r}")
        key = override.key_or_group
        if key not in keys.FIELDS or not (key.partition(".")[0] in SECTIONS or key in ALSO):
            also = ", ".join(ALSO)
            near = keys.nearest(key, [name for name in keys.FIELDS if name.partition(".")[0] in SECTIONS])
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"stage.tune: expected keys of {', '.join(SECTIONS)}, and {also}, got {text!r}{hint}")
        values: list[object] = [override.value()]
        if override.is_sweep_override():
            if override.is_interval_sweep():
                raise UserError(f"stage.tune: expected values separated by commas, got {text!r}")
            try:
                values = list(itertools.islice(override.sweep_iterator(), grammar.MAX_JOBS))
            except (ValueError, HydraException) as error:  # range(1,3,0), glob(*)
                raise UserError(f"stage.tune: expected values that can be listed, got {text!r} ({error})") from error
        if key in found:
            raise UserError(f"stage.tune: expected each key once, got {key} more than once")
        for value in values:
            for problem in keys.value_problems(key, value):
                raise UserError(f"stage.tune: {problem}")
        found[key] = values
    return found


def search(
    start: dict[str, object],
    choices: dict[str, list[object]],
    validate: Callable[[dict[str, object]], tuple[float, float]],
    by: str = "accuracy",
) -> Search:
    """Try the values of one key after another, keeping the best of the earlier ones; no recipe is tried twice.

    Args:
        start: The value of each key while those before it are chosen.
        choices: As `parse` gives them.
        validate: Recipe → its accuracy and its loss on the validation images.
        by: As in `Search`.
    """
    done = Search(by=by)
    for key, values in choices.items():
        best = done.best.recipe if done.trials else start
        for value in values:
            recipe = best | {key: value}
            if recipe not in [trial.recipe for trial in done.trials]:
                done.trials.append(Trial(recipe, *validate(recipe)))
    return done
