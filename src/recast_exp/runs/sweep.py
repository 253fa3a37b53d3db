"""A sweep around its jobs: a folder of its own that knows its jobs, what is there already, and what came of it.

`sweep.json` in the folder lists the jobs; each writes its own `job.json`. The same command with the same folder goes on
where the sweep was stopped. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from recast_exp import __version__, schemas
from recast_exp.config import grammar
from recast_exp.errors import UserError
from recast_exp.files import locked, write_json, writing
from recast_exp.runs import layout
from recast_exp.runs import record as job_record
from recast_exp.runs.plan import Planned, recipe_sources
from recast_exp.runs.results import Results
from recast_exp.runs.state import State

FORMAT = 1

_REPLICATES = frozenset({"seed", "dataset.split_seed"})


class PlannedJob(job_record.Identity):
    """A job as sweep.json lists it; `skipped` says why it is left out."""

    number: int
    folder: str
    skipped: str | None


class SweepRecord(TypedDict):
    """sweep.json."""

    format: int
    version: NotRequired[str]
    command: str
    created: str
    jobs: list[PlannedJob]


class Left(PlannedJob):
    """A job that has recorded nothing yet."""

    state: State
    reason: str | None
    exit_code: int | None


class Recorded(job_record.Begun):
    """The record of a job of a sweep, with its folder in that of the sweep."""

    number: int
    folder: str


class TrialRecord(TypedDict):
    """A trial as search.json lists it."""

    number: int
    folder: str
    state: str
    reason: str | None
    exit_code: int | None
    value: float | None
    parameters: dict[str, str]
    epochs: dict[str, float]
    started: str | None
    ended: str | None


class BestTrial(TrialRecord):
    """The best trial, with the command that runs its setting by itself."""

    command: str


class SearchRecord(TypedDict):
    """search.json."""

    format: int
    metric: str
    direction: str
    n_trials: int
    seed: int
    space: dict[str, str]
    overrides: list[str]
    best: BestTrial | None
    trials: list[TrialRecord]


@dataclasses.dataclass
class Plan:
    """What a sweep is going to do."""

    folder: Path
    command: str
    """As it was typed."""
    jobs: list[PlannedJob]
    """As in `sweep.json`; empty where a sweeper decides as it goes."""

    again: str
    """The command that goes on with this sweep."""

    @property
    def file(self) -> Path:
        """The file that lists its jobs."""
        return self.folder / layout.SWEEP

    searched: int | None = None
    """When a search was last written down in the folder before this one."""


def command_again(argv: Sequence[str], folder: Path) -> str:
    """The command that goes on with the sweep in a folder, to be pasted into a shell."""
    words = [word for word in argv if not word.startswith("hydra.sweep.dir=")]
    return shlex.join(["python", "-m", "recast_exp", *words, f"hydra.sweep.dir={folder}"])


@contextlib.contextmanager
def holding(folder: Path, planned: Sequence[Planned], labels: Sequence[str], argv: Sequence[str]) -> Iterator[Plan]:
    """Hold a sweep's folder until the block ends, and write what is planned.

    Args:
        folder: Folder of the sweep; made if it is not there.
        planned: Its jobs, if they are known.
        labels: The label of each in tables.
        argv: The arguments of the command.

    Raises:
        UserError: If another sweep is running there, or if the folder has jobs with other configurations: one line for
            each. Nothing has been changed then.
    """
    command, again = shlex.join(["python", "-m", "recast_exp", *argv]), command_again(argv, folder)
    job_record.check_place(folder, "hydra.sweep.dir")
    plan = Plan(folder, command, [], again, searched(folder))
    if different := list(_differences(folder, planned)):
        raise UserError(*different)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / layout.LOCK, str(folder), wait=False))
        except TimeoutError as held:
            raise UserError(
                f"hydra.sweep.dir: a sweep is running in {folder}; wait for it, or choose another folder; if there is "
                f"none, remove {held}"
            ) from None
        except OSError as error:
            raise UserError(f"hydra.sweep.dir: the folder of the sweep cannot be made ({error})") from error
        plan.jobs = [
            {
                "number": job.number,
                "folder": str(job.number),
                "overrides": list(job.asked.overrides),
                "label": label,
                "dataset": job.settings.dataset.name,
                "seed": job.settings.seed,
                "skipped": job.unfit,
                "recipe": recipe_sources(job.sources),
                "config": job.content,
            }
            for job, label in zip(planned, labels, strict=True)
        ]
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        content: SweepRecord = {
            "format": FORMAT,
            "version": __version__,
            "command": plan.command,
            "created": now,
            "jobs": plan.jobs,
        }
        if planned or not (folder / layout.SWEEP).is_file():  # a search that goes on may yet be refused
            with writing(f"hydra.sweep.dir: {folder}"):
                write_json(folder / layout.SWEEP, content)
        yield plan


def searched(folder: Path) -> int | None:
    """When a search was last written down in a folder, in nanoseconds; None where none was."""
    try:
        return (folder / layout.SEARCH).stat().st_mtime_ns
    except OSError:
        return None


def read_search(folder: Path) -> SearchRecord:
    """What a search has written of its trials.

    Raises:
        MissingInputError: If it has written nothing yet.
        UserError: If the file is damaged.
    """
    return schemas.read_json(folder / layout.SEARCH, SearchRecord, "the record of a search")


def all_records(plan: Plan) -> list[Recorded | Left]:
    """The records of all jobs that were planned, or of all that there are."""
    found: dict[int, Recorded | Left] = {record["number"]: record for record in records(plan.folder, plan.jobs)}
    for job in plan.jobs:
        found.setdefault(job["number"], {**job, "state": State.WAITING, "reason": None, "exit_code": None})
    return [found[number] for number in sorted(found)]


def records(folder: Path, jobs: Sequence[PlannedJob] = ()) -> list[Recorded]:
    """The records of the jobs of a sweep, by number; `folder` is added.

    Args:
        folder: Folder of the sweep.
        jobs: Its jobs, if they are known; else all that have a folder there.
    """
    found: list[Recorded] = []
    planned = {folder / str(job["folder"]): job["number"] for job in jobs}
    for place in planned or [path.parent for path in folder.glob(f"*/{layout.JOB}")]:
        record = job_record.read(place)
        number = planned.get(place, record["number"] if record else None)  # the plan knows it better
        if record is not None and number is not None:
            found.append({**record, "number": number, "folder": str(place.relative_to(folder))})
    return sorted(found, key=lambda record: int(record["number"]))


def collect(folder: Path, jobs: Sequence[PlannedJob] = ()) -> dict[str, list[Results]]:
    """Results of the finished jobs of a sweep, by their overrides: without what all have.

    Jobs that differ only in the seed or in the draw of the training images are replicates of one setting.

    Returns:
        Setting → the results of each of its jobs. Jobs without results are left out.
    """
    found = [
        record
        for record in records(folder, jobs)
        if record["stage"] == "adapt" and job_record.is_finished(folder / record["folder"])
    ]
    shared = set.intersection(*(set(record["overrides"]) for record in found)) if found else set()
    settings: dict[str, list[Results]] = defaultdict(list)
    for record in found:
        own = [text for text in record["overrides"] if text not in shared and grammar.key(text) not in _REPLICATES]
        settings[" ".join(own) or record["label"]].append(job_record.read_results(folder / record["folder"]))
    return dict(settings)


def _differences(folder: Path, planned: Sequence[Planned]) -> Iterator[str]:
    """How the jobs of a folder differ from those that are planned: one line for each job.

    Raises:
        UserError: If a newer version has written there, or something else lies where a file is to be.
    """
    job_record.check_version(folder, layout.SWEEP, "hydra.sweep.dir", FORMAT)
    if (folder / layout.JOB).is_file():
        raise UserError(f"hydra.sweep.dir: {folder} is the folder of a run; choose a new one")
    for job in planned:
        place = folder / str(job.number)
        job_record.check_version(place, layout.JOB, "hydra.sweep.dir")
        if place.is_symlink():
            yield f"hydra.sweep.dir: expected a folder in {place}, got a link to {place.readlink()}; move it"
            continue
        try:
            job_record.check_place(place, "hydra.sweep.dir")
        except UserError as error:
            yield from error.lines
    try:
        there = len(schemas.decode(folder / layout.SWEEP, SweepRecord)["jobs"])
    except ValueError:
        there = 0
    if planned and there > len(planned):
        yield (
            f"hydra.sweep.dir: {folder} has a sweep of {there} jobs, not {len(planned)}; resume with the original "
            "settings or choose a new folder"
        )
        return
    for job in planned:
        record = job_record.read(folder / str(job.number))
        if record is not None:
            changed = list(job_record.differences(record, job.settings))
            if changed:
                more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
                yield (
                    f"hydra.sweep.dir: job {job.number} in {folder} was {changed[0]}{more}; resume with the original "
                    "settings or choose a new folder"
                )
