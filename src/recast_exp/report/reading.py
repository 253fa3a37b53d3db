"""The jobs below a folder, as plain records. A damaged file becomes a remark in the report, not an error."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from recast_exp import schemas
from recast_exp.config import grammar
from recast_exp.config.schema import DatasetConfig
from recast_exp.errors import one_line, printable
from recast_exp.report import tested
from recast_exp.report.replicates import Replicate
from recast_exp.runs.layout import DATASET, HISTORY, JOB, METRICS, PARAMETERS, SEQUENCE, SWEEP, TASKS, WITHOUT_JOBS
from recast_exp.runs.record import Record
from recast_exp.runs.results import TESTED
from recast_exp.runs.state import State
from recast_exp.runs.sweep import PlannedJob, SweepRecord

T = TypeVar("T")

FORMAT = 1
"""The newest format of job.json and sweep.json that this version reads."""

LEFT_OUT = frozenset({State.SKIPPED, State.PRUNED})
"""States of jobs that have no results and are not meant to have any."""
ACCURACY = "test/accuracy"
DRAW = "dataset.split_seed"
"""The key that draws training and validation images."""
_NEEDED = {METRICS: (ACCURACY,), PARAMETERS: ("task_specific", "task_bits", "head")}
_UNPLANNED = 10**9  # position of jobs that no sweep has planned: after all others, in the order of their folders


class DamagedError(Exception):
    """A file of a run that cannot be read. One line: the file, and why."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One job that was planned or run.

    Attributes:
        folder: Where it is, relative to the folder of the report.
        label: Name of its method in tables; empty if not even that can be read.
        draw: The seed that draws its training and validation images, `dataset.split_seed`.
        state: As in job.json; WAITING if it was only planned, DAMAGED if it has finished and a file cannot be read.
        reason: The reason why it is not finished, if known; one line.
        config: Its resolved configuration; empty if it is not known.
        metrics: metrics.json, of a finished job.
        parameters: parameters.json, of a finished job.
        plan: The configuration of a job that has not run, as its sweep planned it; interpolations as they stand.
        images: What a finished job was trained and tested on, if that is known.
        source: Its dataset, and its folder of images if it names one; several columns (`dataset`) may come from one.
    """

    folder: str
    path: Path
    label: str
    dataset: str
    seed: int
    draw: int
    state: State
    reason: str | None = None
    overrides: tuple[str, ...] = ()
    config: Mapping[str, object] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, object] = dataclasses.field(default_factory=dict)
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)
    updated: str = ""
    progress: str = ""
    plan: Mapping[str, object] = dataclasses.field(default_factory=dict)
    images: tested.Images | None = None
    source: tuple[str, str | None] = ("", None)

    @property
    def finished(self) -> bool:
        """Whether it has results that count."""
        return self.state == State.FINISHED

    @property
    def replicate(self) -> Replicate:
        """What tells it from the other runs of its method on its dataset."""
        return Replicate(self.seed, self.draw)

    @property
    def accuracy(self) -> float:
        """Test accuracy of a finished job, from 0 to 1."""
        return _number(self.metrics, ACCURACY)

    def count(self, name: str) -> int:
        """A count of a finished job that every report needs."""
        return int(_number(self.parameters, name))

    def setting(self, *names: str) -> object:
        """A value of the configuration; None if there is none."""
        return _setting(self.config, *names)


@dataclasses.dataclass(frozen=True)
class Contents:
    """The jobs and sweeps below a folder.

    Attributes:
        jobs: Those of stage=adapt, in the order of their sweeps.
        commands: The command of each sweep.
        remarks: The omissions of the report, one line each.
    """

    folder: Path
    jobs: tuple[Job, ...]
    commands: tuple[str, ...]
    remarks: tuple[str, ...]


def has_jobs(folder: Path) -> bool:
    """Whether there is anything to report on below a folder; cheap.

    Raises:
        OSError: If nothing is found and a folder cannot be opened.
    """
    closed: list[OSError] = []
    if any(path.name == SWEEP or _is_reported(path) for path in records(folder, SWEEP, JOB, closed=closed)):
        return True
    if closed and not isinstance(closed[0], FileNotFoundError):
        raise closed[0]
    return False


def _is_reported(path: Path) -> bool:
    """Whether a report shows the job of a record, or that the record is damaged."""
    try:
        return schemas.decode(path, _Staged)["stage"] in ("adapt", "sequence")
    except ValueError:
        return True


class _Staged(TypedDict):
    stage: str


def read_jobs(folder: Path) -> Contents:
    """Read every job below a folder, and every job that a sweep has planned there."""
    commands: list[str] = []
    remarks: list[str] = []
    planned: dict[Path, tuple[int, Job]] = {}
    ran: list[Path] = []
    sweeps: list[Path] = []
    closed: list[OSError] = []
    for path in records(folder, SWEEP, JOB, closed=closed):
        (sweeps if path.name == SWEEP else ran).append(path)
    for path in sweeps:
        try:
            sweep = read_json(path, SweepRecord)
            commands.append(sweep["command"] or f"(not recorded in {_relative(path, folder)})")
            plan = [(path.parent / _below(entry["folder"]), entry) for entry in sweep["jobs"]]
            planned |= {
                job_dir: (len(planned) + at, _planned(job_dir, entry, folder))
                for at, (job_dir, entry) in enumerate(plan)
            }
        except DamagedError as error:
            remarks.append(f"{_relative(path.parent, folder)}: {error}; jobs that never started are unknown")
    jobs: list[tuple[tuple[int | tuple[int, str], ...], Job]] = []
    other_stages = 0
    for path in ran:
        at, plan_of = planned.pop(path.parent, (_UNPLANNED, None))
        job = _ran(path, folder, plan_of)
        if job is None:
            other_stages += not (path.parent / SEQUENCE).is_file()  # these have a section of their own
        else:
            jobs.append(((at, *_natural(job.folder)), job))
    for problem in closed:
        path = Path(problem.filename)
        reason = f"the folder cannot be opened ({problem.strerror})"
        below = [job_dir for job_dir in planned if job_dir.is_relative_to(path)]
        for job_dir in below:
            at, job = planned[job_dir]
            planned[job_dir] = at, dataclasses.replace(job, state=State.DAMAGED, reason=reason)
        if not below:
            remarks.append(f"{_relative(path, folder)}: {reason}; what is in it is not shown")
    jobs += [((at, *_natural(job.folder)), job) for at, job in planned.values()]
    if other_stages:
        remarks.append(f"{other_stages} job(s) of other stages than adapt are not shown")
    jobs.sort(key=lambda pair: pair[0])
    named, unlike = tested.told_apart([job for _, job in jobs])
    return Contents(folder, named, tuple(commands), (*remarks, *unlike))


def records(folder: Path, *names: str, closed: list[OSError] | None = None) -> Iterator[Path]:
    """The files of these names below a folder, except in the folders of reports and trackers.

    Links to folders are followed, after all that is not behind one; no folder is visited twice, and none that holds
    the folder itself.

    Args:
        folder: Where to look.
        names: Names of files.
        closed: Takes the errors of folders that cannot be opened.
    """
    seen = set(folder.resolve().parents)
    waiting = [folder]
    for start in waiting:
        for root, folders, files in os.walk(start, onerror=None if closed is None else closed.append):
            here = Path(root)
            if (real := here.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            # The runs within a sequence are no replicates of one method
            left_out = WITHOUT_JOBS | ({TASKS} if JOB in files else set())
            kept = sorted((name for name in folders if name not in left_out), key=_natural)
            waiting += (here / name for name in kept if (here / name).is_symlink())
            folders[:] = kept  # `os.walk` itself goes behind no link
            yield from (here / name for name in names if name in files)


def read_history(job: Job) -> list[dict[str, float]]:
    """The epochs of a job: a row of values for each; empty if it wrote none.

    Raises:
        DamagedError: If metrics.csv cannot be read.
    """
    path = job.path / HISTORY
    if not path.is_file():
        return []
    try:
        if path.stat().st_size > schemas.LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes, where {schemas.LARGEST:,} are the limit")
        with path.open(encoding="utf-8-sig", newline="") as file:  # a spreadsheet may have put a mark at its start
            return [
                {name: float(value) for name, value in row.items() if name and value} for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DamagedError(f"{path.name} cannot be read ({one_line(error, limit=120)})") from error


def read_json(path: Path, schema: type[T]) -> T:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        schema: The type of its content.

    Raises:
        DamagedError: If it is missing, cut short, of a newer format, or does not fit the schema.
    """
    if not path.exists():
        raise DamagedError(f"{path.name} is missing")
    try:
        content = _shown(schemas.decode(path, dict[str, Any]))
        version = content.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise DamagedError(f"{path.name} has format {version}, this version reads up to {FORMAT}")
        return schemas.checked(content, schema)
    except ValueError as error:
        raise DamagedError(f"{path.name} cannot be read ({error})") from error


def _shown(content: Any) -> Any:
    """The same content as text: no half of a character, which no file can hold, and nothing that a terminal obeys."""
    if isinstance(content, str):
        return printable(content.encode(errors="replace").decode())
    if isinstance(content, dict):
        return {_shown(name): _shown(value) for name, value in content.items()}
    return [_shown(value) for value in content] if isinstance(content, list) else content


def _below(name: str) -> str:
    """The folder of a job, which is below that of its sweep.

    Raises:
        DamagedError: If it is not.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DamagedError(f"{SWEEP} has a job in {name[:80]!r}, which is not below its folder")
    return name


def _planned(path: Path, entry: PlannedJob, folder: Path) -> Job:
    skipped = entry.get("skipped")
    overrides = tuple(map(str, entry.get("overrides") or ()))
    return Job(
        folder=_relative(path, folder),
        path=path,
        label=str(entry["label"]),
        dataset=str(entry["dataset"]),
        seed=int(entry["seed"]),
        draw=_draw(entry.get("config"), overrides),
        state=State.SKIPPED if skipped else State.WAITING,
        reason=_line(skipped),
        overrides=overrides,
        plan=entry.get("config") or {},
    )


def _ran(path: Path, folder: Path, planned: Job | None) -> Job | None:
    """The job of a job.json; None if it belongs to another stage."""
    try:
        record = read_json(path, Record)
    except DamagedError as error:
        return _damaged(path, folder, planned, str(error))
    if record["stage"] != "adapt":
        return None
    job = _recorded(path, folder, record)
    if not job.finished:
        return job
    try:
        metrics, parameters = _whole(job.path / METRICS), _whole(job.path / PARAMETERS)
    except DamagedError as error:
        return dataclasses.replace(job, state=State.DAMAGED, reason=str(error))
    return dataclasses.replace(job, metrics=metrics, parameters=parameters, images=_images(job.path, metrics))


def _images(folder: Path, metrics: Mapping[str, object]) -> tested.Images | None:
    """What a finished job was trained and tested on; None where its card is missing or damaged."""
    try:
        card = read_json(folder / DATASET, tested.Card)
    except DamagedError:
        return None
    count = metrics.get(TESTED)
    return tested.Images(card, int(count) if isinstance(count, int | float) else None)


def _damaged(path: Path, folder: Path, planned: Job | None, reason: str) -> Job:
    """The job of a job.json that cannot be read: as its sweep has planned it, if one has."""
    unknown = Job(_relative(path.parent, folder), path.parent, "", "", -1, _draw(None, ()), State.DAMAGED)
    return dataclasses.replace(planned or unknown, state=State.DAMAGED, reason=reason)


def _has_died(record: Record) -> bool:
    """Whether a job recorded as running was killed: its process belonged to this machine, and no longer exists."""
    if record["state"] != State.RUNNING or record.get("host") != socket.gethostname() or os.name == "nt":
        return False  # on Windows, the signal below would stop the process
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return False
    return False


def _recorded(path: Path, folder: Path, record: Record) -> Job:
    config = record.get("config")
    overrides = tuple(map(str, record.get("overrides") or ()))
    epochs = record.get("epochs")
    recorded, reason = str(record["state"]), _line(record.get("reason"))
    state = State.INTERRUPTED if _has_died(record) else State.of(recorded, reason)
    if state == State.DAMAGED:
        reason = f"{JOB} has the state {recorded!r}, which this version does not know"
    return Job(
        folder=_relative(path.parent, folder),
        path=path.parent,
        label=str(record["label"]),
        dataset=str(record["dataset"]),
        seed=int(record["seed"]),
        draw=_draw(config, overrides),
        state=state,
        reason=reason,
        overrides=overrides,
        config=config if isinstance(config, dict) else {},
        updated=str(record.get("updated") or ""),
        progress=f"epoch {record.get('epoch') or 0} of {epochs}" if epochs else "",
    )


def _draw(config: object, overrides: Sequence[str]) -> int:
    """The draw of the training images: as it was configured, if that is recorded, else as in the overrides."""
    for draw in _values(config, overrides, DRAW):
        if isinstance(draw, int) or (isinstance(draw, str) and _is_number(draw)):
            return int(draw)
    return DatasetConfig().split_seed


def _values(config: object, overrides: Sequence[str], key: str) -> list[object]:
    """The value of a key: as it was configured, if that is recorded, then as in the overrides, the last one first."""
    typed = [text.partition("=")[2].strip("\"'") for text in overrides if grammar.key(text) == key]
    return [_setting(config, *key.split(".")), *reversed(typed)]


def _setting(config: object, *names: str) -> object:
    for name in names:
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _whole(path: Path) -> dict[str, object]:
    """Read a file of results, which must hold the values that the report needs."""
    content: dict[str, object] = read_json(path, dict[str, object])
    for name in _NEEDED[path.name]:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DamagedError(f"{path.name} has no number {name}")
        if value < 0 or (name.endswith("accuracy") and value > 1):
            raise DamagedError(f"{path.name} has {name}={value}, which cannot be")
    return content


def _number(content: Mapping[str, object], name: str) -> float:
    value = content[name]
    assert isinstance(value, int | float), name  # `_whole` has looked
    return value


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key that puts 10 after 9, and numbers before names."""
    return tuple((int(part), "") if _is_number(part) else (10**9, part) for part in name.split("/"))


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 20  # Python refuses to read thousands of digits


def _line(text: object) -> str | None:
    return " ".join(str(text).split()) or None if text else None
