"""The searches below a folder. Trials are selected by validation accuracy, and therefore shown with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from recast_exp.report.reading import Contents, DamagedError, Job, read_json, records
from recast_exp.runs.layout import SEARCH
from recast_exp.runs.state import State
from recast_exp.runs.sweep import SearchRecord, TrialRecord


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting tried by a search.

    Attributes:
        folder: Folder of its job, relative to that of the report.
        accuracy: Validation accuracy, from 0 to 1; for an unfinished trial, that of its last epoch, if any.
        parameters: Key → the value sampled for it, as a string.
    """

    number: int
    folder: str
    state: State
    reason: str | None
    accuracy: float | None
    epochs: int
    parameters: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        name: Its folder, relative to that of the report.
        planned: Number of trials planned.
        space: Key → the distribution it is sampled from, in Hydra's grammar.
        best: Number of the best finished trial.
        command: The command that runs the best setting by itself.
    """

    name: str
    planned: int
    space: Mapping[str, str]
    trials: tuple[Trial, ...]
    best: int | None
    command: str

    @property
    def title(self) -> str:
        """Its heading, with its folder unless that is the folder of the report."""
        return "Search" if self.name == "." else f"Search {self.name}"

    @property
    def ranked(self) -> list[Trial]:
        """The trials in the order of the table: finished ones first, by accuracy, then the others, by number."""
        finished = [trial for trial in self.trials if trial.state == State.FINISHED]
        rest = [trial for trial in self.trials if trial.state != State.FINISHED]
        return sorted(finished, key=lambda trial: -(trial.accuracy or 0)) + rest

    @property
    def status(self) -> str:
        """The numbers of trials in each state, in words."""
        counts: dict[State, int] = {}
        for trial in self.trials:
            counts[trial.state] = counts.get(trial.state, 0) + 1
        rest = ", ".join(f"{count} {state}" for state, count in counts.items())
        return f"{len(self.trials)} of {self.planned} trials" + (f": {rest}" if rest else "")


def read_searches(contents: Contents) -> tuple[Contents, tuple[Search, ...]]:
    """Read every search below a folder.

    Returns:
        The contents of the folder without the jobs of trials, except the best trial of each search; and the searches.
        A setting selected among many is not a method of its own, and the test set is never used for selection.
    """
    searches, remarks, left_out = [], [], set()
    for path in records(contents.folder, SEARCH):
        relative = path.parent.relative_to(contents.folder).as_posix()
        try:
            search = _search(relative, read_json(path, SearchRecord))
        except (DamagedError, ValueError) as error:
            why = str(error) if isinstance(error, DamagedError) else f"{SEARCH} is not the record of a search"
            remarks.append(f"{relative}: {why}; its trials are shown as jobs")
            continue
        searches.append(search)
        left_out |= {trial.folder for trial in search.trials if trial.number != search.best}
    jobs = tuple(job for job in contents.jobs if not (job.folder in left_out and _is_trial(job)))
    return dataclasses.replace(contents, jobs=jobs, remarks=(*contents.remarks, *remarks)), tuple(searches)


def _is_trial(job: Job) -> bool:
    """Whether a job belongs to a search: a grid could have left another job in the same folder."""
    return job.setting("search", "trial") is not None or not job.config


def _search(name: str, content: SearchRecord) -> Search:
    best = content["best"]
    return Search(
        name=name,
        planned=int(content["n_trials"]),
        space={str(key): str(value) for key, value in content["space"].items()},
        trials=tuple(_trial(name, entry) for entry in content["trials"]),
        best=None if best is None else int(best["number"]),
        command="" if best is None else str(best["command"]),
    )


def _trial(search: str, entry: TrialRecord) -> Trial:
    epochs = {int(epoch): float(value) for epoch, value in entry["epochs"].items()}
    value = entry["value"] if entry["value"] is not None else epochs.get(max(epochs, default=0))
    return Trial(
        number=int(entry["number"]),
        folder=str(entry["folder"]) if search == "." else f"{search}/{entry['folder']}",
        state=State.of(str(entry["state"]), entry["reason"]),
        reason=entry["reason"],
        accuracy=float(value) if value is not None and 0 <= value <= 1 else None,
        epochs=len(epochs),
        parameters={str(key): str(value) for key, value in entry["parameters"].items()},
    )


def numbers(values: Sequence[str]) -> list[float] | None:
    """Strings as numbers; None if one of them is not a number."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None
