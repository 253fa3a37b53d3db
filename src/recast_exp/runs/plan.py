"""The jobs of a command: what each was asked for, and the settings that were checked and that will run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from recast_exp.config import keys, rules
from recast_exp.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Asked:
    """The overrides of one job, one value each."""

    options: tuple[str, ...]
    """Options of groups (`model=vit_mlp`)."""
    values: tuple[str, ...]
    """Values of keys (`optimizer.lr=0.1`)."""
    swept: Mapping[str, str]
    """By key, those of both that differ between the jobs of a sweep."""
    overrides: tuple[str, ...] = ()
    """Both, in the order in which they were typed: that of Hydra's sweeper."""


@dataclasses.dataclass
class Planned:
    """A job that will run."""

    number: int
    asked: Asked
    content: dict[str, object]
    """Its composed configuration as nested mappings, with what its task file brings; interpolations as they stand."""
    settings: Config
    """The same, typed and resolved."""
    sources: Mapping[str, str]
    """Dotted key → the file that set it, or `command line`."""
    unfit: str | None = None
    """Why a sweep leaves it out: its adapter does not fit its model."""


def cause(line: str, failing: Sequence[Asked], jobs: Sequence[Asked]) -> str:
    """Name the swept values that the failing jobs of a sweep share, where other jobs are well and `line` does not."""
    if len(failing) == len(jobs):
        return ""
    shared = set.intersection(*(set(job.swept.values()) for job in failing))
    named = [text for text in failing[0].swept.values() if text in shared]
    what = [text.replace('"', "").lstrip("+") for text in named or failing[0].swept.values()]
    if all(text in line for text in what):
        return ""
    more = f", and {len(failing) - 1} more" if not named and len(failing) > 1 else ""
    return f" (where {' '.join(what)}{more})"


_RECIPE = ("optimizer.", "scheduler.", "trainer.", "dataset.batch_size", "dataset.transform")

_OF_GRADIENT_DESCENT = (
    *("optimizer.", "scheduler.", "training", "select", "trainer.max_epochs", "trainer.accumulate"),
    *("trainer.gradient_clip", "trainer.head_first_epochs", "trainer.validate_every", "trainer.early_stopping"),
)


def recipe_sources(sources: Mapping[str, str]) -> dict[str, str]:
    """Of all keys, those of a training recipe, with the file that set each."""
    return {key: file for key, file in sources.items() if key.startswith(_RECIPE) and keys.decides(key)}


def recipe_line(settings: Config, sources: Mapping[str, str]) -> str:
    """Which file set what of a recipe, in one line; the optimiser and the schedule by their names."""
    by_source: dict[str, list[str]] = {}
    for key, file in recipe_sources(sources).items():
        group, _, option = file.rpartition("/")
        if group and group not in ("optimizer", "scheduler"):
            by_source.setdefault(f"{group}={option}", []).append(f"{key}={_short(rules.value_of(settings, key))}")
        elif not group and file != "config":
            by_source.setdefault(file, []).append(f"{key}={_short(rules.value_of(settings, key))}")
    parts = [f"{source} sets {', '.join(values)}" for source, values in by_source.items()]
    epochs = settings.trainer.max_epochs
    noun = "epoch" if epochs == 1 else "epochs"
    names = f"{settings.optimizer.name}, {settings.scheduler.name} schedule, {epochs} {noun}"
    return f"Recipe: {'; '.join([names, *parts])}"


def without_effect(keys_typed: Iterable[str]) -> str:
    """Name in one line the keys that were typed though nothing is trained by gradient descent; empty for none."""
    typed = [key for key in keys_typed if key.startswith(_OF_GRADIENT_DESCENT)]
    if not typed:
        return ""
    return (
        f"{', '.join(typed)}: no effect, as nothing is trained but the head, which is solved; head=linear trains it by "
        "gradient descent"
    )


def _short(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
