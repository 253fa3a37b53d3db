"""What a job writes of itself: `job.json` in its folder. It says what is asked, how far it is, and how it ended.

It is begun before the work, renewed with every epoch and closed at the end, each time atomically; whoever watches a
sweep, continues it or reports on it reads these files, on whatever machine the jobs run. Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from recast_exp import schemas
from recast_exp.config import keys
from recast_exp.config.schema import Config
from recast_exp.errors import Pruned, RecastError, UserError
from recast_exp.files import user_path, write_json
from recast_exp.runs import layout
from recast_exp.runs.results import Counts, Metrics, Results
from recast_exp.runs.state import State
from recast_exp.runs.task_header import read_record
from recast_exp.system import is_main_process

FORMAT = 1


class _Versioned(TypedDict):
    """What a record of any version has."""

    format: int


class Identity(TypedDict):
    """What a job's own record and the plan of its sweep both say of it; the plans of early versions had no `config`."""

    overrides: list[str]
    label: str
    dataset: str
    seed: int
    recipe: NotRequired[dict[str, str]]
    config: NotRequired[dict[str, object]]


_Validated = TypedDict("_Validated", {"val/accuracy": float | None})


class Begun(Identity, _Validated):
    """What a record says of any job, a job of a sweep or not."""

    format: int
    state: str
    """A `State`, or a word of an earlier version."""
    reason: str | None
    exit_code: int | None
    stage: str
    pid: NotRequired[int]
    host: NotRequired[str]
    started: str
    updated: str
    epoch: int
    epochs: int


class Record(Begun):
    """job.json."""

    number: int | None
    """In its sweep."""


def read(folder: Path) -> Record | None:
    """The record of a job's folder; None where there is none, or none that can be read."""
    try:
        record = schemas.decode(folder / layout.JOB, Record)
    except ValueError:
        return None
    record["state"] = State.of(record["state"], record["reason"])
    return record if record["format"] <= FORMAT else None


def begin(
    folder: Path,
    settings: Config,
    *,
    label: str,
    overrides: list[str],
    number: int | None = None,
    sources: Mapping[str, str] | None = None,
) -> None:
    """Write that a job has begun, in place of what an earlier attempt has written.

    Args:
        folder: Folder of the job.
        settings: Its settings.
        label: What tables call its method.
        overrides: The overrides that it was started with.
        number: Its number in a sweep.
        sources: Key of the recipe → the file that set it.
    """
    if not is_main_process(settings.trainer.devices):
        return
    now = _now()
    record: Record = {
        "format": FORMAT,
        "state": State.RUNNING,
        "reason": None,
        "exit_code": None,
        "number": number,
        "label": label,
        "stage": settings.stage["name"],
        "dataset": settings.dataset.name,
        "seed": settings.seed,
        "overrides": overrides,
        "config": dataclasses.asdict(settings),
        "recipe": dict(sources or {}),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now,
        "updated": now,
        "epoch": 0,
        "epochs": settings.trainer.max_epochs,
        "val/accuracy": None,
    }
    write_json(folder / layout.JOB, record)


def planned_sources(folder: Path) -> dict[str, str]:
    """Which file set each key of a job's recipe, as its sweep has planned it; nothing for a job of no sweep."""
    try:
        jobs = schemas.decode(folder.parent / layout.SWEEP, _Planned)["jobs"]
    except ValueError:
        return {}
    return next((job.get("recipe", {}) for job in jobs if job["folder"] == folder.name), {})


class _PlannedJob(TypedDict):
    folder: str
    recipe: NotRequired[dict[str, str]]


class _Planned(TypedDict):
    """Of sweep.json, what a job wants to know."""

    jobs: list[_PlannedJob]


def update(folder: Path, **changes: object) -> None:
    """Change what a record says, and when; nothing where there is no record."""
    record = read(folder)
    if record is not None and is_main_process(_devices(record)):
        write_json(folder / layout.JOB, {**record, "updated": _now(), **changes})


def _devices(record: Record) -> int:
    """The number of devices of the run that a record speaks of."""
    trainer = record["config"].get("trainer")
    return int(trainer.get("devices", 1)) if isinstance(trainer, Mapping) else 1


@contextlib.contextmanager
def ending(folder: Path) -> Iterator[None]:
    """Record how the job that has begun in a folder ends: with the block, or with what it raises."""
    spare = os.open(os.devnull, os.O_RDONLY)  # where too many files are open, the record could not be written either
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, spare)
            yield
    except KeyboardInterrupt:
        update(folder, state=State.INTERRUPTED, reason="interrupted", exit_code=130)
        raise
    except Pruned as pruned:
        update(folder, state=State.PRUNED, reason=str(pruned))
        raise
    except RecastError as error:
        update(folder, state=State.FAILED, reason=str(error), exit_code=error.exit_code)
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        update(folder, state=State.FAILED, reason=reason, exit_code=1)
        raise
    update(folder, state=State.FINISHED)


def clear(folder: Path) -> None:
    """Remove what another job has left in a folder and this one would take for its own."""
    for left in (folder / layout.METRICS, folder / layout.VALIDATION, layout.checkpoint(folder)):
        left.unlink(missing_ok=True)


def check_same(folder: Path, known: Record | None, settings: Config, key: str) -> None:
    """Refuse to run a job in the folder of another one.

    Args:
        folder: The folder.
        known: Its record; None if it has none.
        settings: What is asked for now.
        key: The key that chooses the folder, for the message.

    Raises:
        UserError: If a run was started there with other settings, or by a newer version.
    """
    check_place(folder, key)
    check_version(folder, layout.JOB, key)
    if known is None:
        return
    different = next(itertools.chain(differences(known, settings), _other_options(known, settings)), None)
    if different and (known["stage"] not in _ANEW or known["stage"] != settings.stage["name"]):
        raise UserError(f"{key}: the job in {folder} was {different}; choose a new folder")


_ANEW = frozenset({"compare", "publish"})
"""Stages that go on with other settings, too: they look at each of their runs by itself, or write all files anew."""


def _other_options(known: Record, settings: Config) -> Iterator[str]:
    """Where a job was started with other options of its stage; tasks may come to the end of a sequence, or leave it."""
    before, now = known["config"].get("stage"), settings.stage
    if not isinstance(before, Mapping):
        return
    for option in before.keys() & now.keys():
        old, new = before[option], now[option]
        if known["stage"] == "sequence" and option not in ("tasks", "splits", "start_from"):
            continue
        if known["stage"] == "sequence" and isinstance(old, list) and isinstance(new, list):
            length = min(len(old), len(new))
            old, new = old[:length], new[:length]
        if old != new:
            yield f"started with stage.{option}={keys.shown(old)}, not {keys.shown(new)}"


def check_own(folder: Path, key: str) -> None:
    """Refuse a folder with files that a job would take for its own, or replace, though no job has written there.

    Args:
        folder: The folder; it need not be there.
        key: The key that chooses it, for the message.

    Raises:
        UserError: One line.
    """
    if (folder / layout.JOB).exists() or (folder / layout.HYDRA).exists():
        return
    if there := [name for name in layout.FILES if name != layout.LOCK and (folder / name).exists()]:
        raise UserError(
            f"{key}: expected the folder of a run or a new one, got {folder}, which has a {there[0]} already"
        )


def check_place(folder: Path, key: str) -> None:
    """Refuse a folder in which a job could not write.

    Args:
        folder: The folder; it need not be there.
        key: The key that chooses it, for the message.

    Raises:
        UserError: If a link, or what is no file, lies in the place of a file, or a file in that of a folder.
    """
    if (path := layout.in_the_way(folder)) is not None:
        if path.is_symlink():
            raise UserError(f"{key}: expected a job's own files, got {path}, a link to {path.readlink()}; move it")
        expected = "folder" if path.is_file() else "file"
        got = "file" if path.is_file() else "folder" if path.is_dir() else "pipe or device"
        raise UserError(f"{key}: expected a {expected} in {path}, got a {got}; move it, or choose a new folder")


def check_version(folder: Path, name: str, key: str, newest: int = FORMAT) -> None:
    """Refuse to write where a newer version has written what this one cannot read.

    Args:
        folder: The folder.
        name: The file in it, `job.json` or `sweep.json`.
        key: The key that chooses the folder, for the message.
        newest: The newest format of the file that this version reads.

    Raises:
        UserError: One line.
    """
    try:
        version = schemas.decode(folder / name, _Versioned)["format"]
    except ValueError:  # there is none, or it is damaged
        return
    if version > newest:
        raise UserError(
            f"{key}: {folder / name} has format {version}, this version reads up to {newest}; update recast_exp, or "
            "choose a new folder"
        )


def differences(record: Record, settings: Config) -> Iterator[str]:
    """What a job was started with and is asked for now: one line for each deciding key that differs."""
    if record["stage"] != settings.stage["name"]:
        yield f"started with stage={record['stage']}, not {settings.stage['name']}"
    different = keys.differences(dict(keys.leaves(record["config"])), dict(keys.leaves(dataclasses.asdict(settings))))
    for key, (before, now) in different.items():
        yield f"started with {key}={keys.shown(before)}, not {keys.shown(now)}"
    dataset = record["config"].get("dataset")
    path, other = (dataset.get("path") if isinstance(dataset, Mapping) else None), settings.dataset.path
    # A folder of images that is no longer there has been moved, and is the same one in another place
    if path and other and user_path(path).exists() and user_path(path).resolve() != user_path(other).resolve():
        yield f"started with dataset.path={path}, not {other}"


def read_metrics(folder: Path) -> Metrics:
    """The metrics of a finished run.

    Raises:
        MissingInputError: If it has none.
        UserError: If they are damaged.
    """
    path = folder / layout.METRICS
    metrics: Metrics = schemas.read_json(path, Metrics, "the metrics of a run")
    for name, value in metrics.items():
        if name.rpartition("/")[2].startswith("accuracy") and not (isinstance(value, float | int) and 0 <= value <= 1):
            raise UserError(f"{path}: expected {name} from 0 to 1, got {value!r}")
    return metrics


def read_results(folder: Path) -> Results:
    """The metrics and the counts of a finished run.

    Raises:
        MissingInputError: If it has none.
        UserError: If they are damaged.
    """
    counts = schemas.read_json(folder / layout.PARAMETERS, Counts, "the parameters of a run")
    return Results(read_metrics(folder), counts)


def is_finished(folder: Path, needed: Sequence[str] = ("val/accuracy", "test/accuracy")) -> bool:
    """Whether a job has all its results, readable and whole; a record that says so is not enough.

    Args:
        folder: Folder of the job.
        needed: Metrics that it must have, numbers of at least 0.
    """
    record = read(folder)
    if record is None or record["state"] != State.FINISHED:
        return False
    try:
        if record["stage"] != "adapt":
            read_metrics(folder)
            return True
        metrics, parameters = read_results(folder)
        task = read_record(folder / layout.TASK)
        numbers = [*(metrics[name] for name in needed), parameters["task_specific"]]
        sound = all(isinstance(value, float | int) and value >= 0 for value in numbers)
    except (OSError, ValueError, KeyError, TypeError, RecastError):
        return False
    return sound and task["config"].get("seed", keys.default("seed")) == record["seed"]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
