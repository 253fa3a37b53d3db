"""The tasks of a sequence: datasets, or parts of the classes of one, each with its settings and images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recast_exp.config import rules, sequences
from recast_exp.config.schema import Config, with_values
from recast_exp.config.variants import Variants
from recast_exp.data import load_dataset, read_official
from recast_exp.data.protocol import choose
from recast_exp.data.types import ImageSet
from recast_exp.errors import UserError, section
from recast_exp.experiment.check import check_experiment

COMMON: dict[str, object] = {"stage": {"name": "adapt"}}


@dataclass(frozen=True, eq=False)
class SequenceTask:
    """A task of a sequence.

    Attributes:
        name: Its name, which no other task of the sequence has: `cub[0:50]`.
        settings: The settings of its run.
        images: Its images.
    """

    name: str
    settings: Config
    images: ImageSet


def tasks_of(settings: Config, variants: Variants, entries: Sequence[str], splits: int | None) -> list[SequenceTask]:
    """The tasks that a command asks for, in order; their images are opened, so that what is missing is said at once.

    Args:
        settings: The settings of the command.
        variants: What composes the command with other options.
        entries: `DATASET[FIRST:LAST] key=value …`; none for the dataset of the command.
        splits: Number of tasks to divide the classes of the one dataset into; None for tasks as they are listed.

    Raises:
        UserError: If an entry cannot be composed, a slice holds no class, or there are fewer classes than splits.
        MissingInputError: If images are not there.
    """
    tasks: list[SequenceTask] = []
    for entry, own in _composed(settings, variants, entries):
        with section(_of(entry)):
            parsed = sequences.parse(entry)
            classes = load_dataset(own.dataset, own.data_dir).classes
            for part in _parts(classes, parsed.classes, splits):
                start = classes.index(part[0])
                whole = len(part) == len(classes)
                name = parsed.dataset if whole else f"{parsed.dataset}[{start}:{start + len(part)}]"
                task = own if whole else with_values(own, {"dataset.classes": [_literal(each) for each in part]})
                tasks.append(SequenceTask(_free(name, tasks), task, load_dataset(task.dataset, task.data_dir)))
    return tasks


def check_tasks(settings: Config, variants: Variants, entries: Sequence[str], splits: int | None) -> None:
    """Refuse tasks that `tasks_of` would refuse, before anything is written; nothing is loaded or decoded for it.

    Args:
        settings: As of `tasks_of`.
        variants: As of `tasks_of`.
        entries: As of `tasks_of`.
        splits: As of `tasks_of`.

    Raises:
        UserError: As of `tasks_of`.
        MissingInputError: As of `tasks_of`.
    """
    for entry, own in _composed(settings, variants, entries):
        with section(_of(entry)):
            if sequences.parse(entry).overrides:  # the others have the model of the command, which is looked at
                check_experiment(own)
            # Those that are to be loaded are not there yet; to leave damaged ones out, all would have to be decoded
            if not own.dataset.download and own.dataset.bad_images == "error":
                classes = choose(own.dataset, read_official(own.dataset, own.data_dir)).classes
                _parts(classes, sequences.parse(entry).classes, splits)


def _composed(settings: Config, variants: Variants, entries: Sequence[str]) -> Iterator[tuple[str, Config]]:
    """The tasks as they are written, each with its settings."""
    for entry in entries or [settings.dataset.name]:
        with section(_of(entry)):
            parsed = sequences.parse(entry)
            own = settings if not entries else variants.compose(f"dataset={parsed.dataset}", *parsed.overrides)
            own = with_values(own, COMMON)
            if problems := list(rules.problems(own)):
                raise UserError(*problems)
        yield entry, own


def _of(entry: str) -> str:
    return f"stage.tasks: {entry}: "


def _parts(classes: Sequence[str], wanted: slice, splits: int | None) -> list[Sequence[str]]:
    """The classes of each task of an entry."""
    chosen = classes[wanted]
    if len(chosen) < 2:
        raise UserError(f"expected at least two of its {len(classes)} classes, got {len(chosen)}")
    return [chosen] if splits is None else _divided(chosen, splits)


def together(tasks: Sequence[SequenceTask]) -> Config | None:
    """The settings of one run on the classes of all tasks; None where they are not parts of one dataset."""
    first = tasks[0].settings
    without = {"dataset.classes": None}
    if any(with_values(task.settings, without) != with_values(first, without) for task in tasks):
        return None
    names = [name for task in tasks for name in task.images.classes]
    if len(set(names)) < len(names):
        return None
    return with_values(first, {"dataset.classes": [_literal(name) for name in names]})


def _divided(classes: Sequence[str], count: int) -> list[Sequence[str]]:
    if len(classes) < 2 * count:
        raise UserError(f"stage.splits: expected at most {len(classes) // 2} for {len(classes)} classes, got {count}")
    edges = [round(at * len(classes) / count) for at in range(count + 1)]
    return [classes[start:end] for start, end in itertools.pairwise(edges)]


def _literal(name: str) -> str:
    """A class name as a pattern that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _free(name: str, tasks: Sequence[SequenceTask]) -> str:
    taken = {task.name for task in tasks}
    return name if name not in taken else next(f for n in range(2, 10**6) if (f := f"{name} ({n})") not in taken)
