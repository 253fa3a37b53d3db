"""The progress of a sweep: one live table in a terminal, otherwise a line for each job that ends.

It is read from the `job.json` of the jobs, so they may run in any process and on any machine. For a search,
`search.json` is read too, as its jobs are not known in advance.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from recast_exp.config.grammar import short
from recast_exp.display.cells import cell
from recast_exp.errors import RecastError
from recast_exp.runs import record as job_record
from recast_exp.runs.record import Record
from recast_exp.runs.state import State
from recast_exp.runs.sweep import PlannedJob, read_search

INTERVAL = 0.5  # seconds between two readings of the files
ROWS = 12  # of the live table, in addition to the jobs that run
ENDED = frozenset({State.FINISHED, State.FAILED, State.SKIPPED, State.PRUNED})

_Validated = TypedDict("_Validated", {"val/accuracy": NotRequired[float | None]})


class Progress(_Validated):
    """How far a job is; one that has not begun has only its state."""

    state: str
    started: NotRequired[str]
    updated: NotRequired[str | None]
    epoch: NotRequired[int]
    epochs: NotRequired[int]


class Watched(Progress):
    """A job of a sweep: what is planned, and how far it is."""

    number: int
    label: str
    dataset: str
    seed: int
    skipped: str | None
    reason: NotRequired[str | None]


@contextlib.contextmanager
def watching(folder: Path, jobs: Sequence[PlannedJob]) -> Iterator[None]:
    """Show the progress of the jobs of a sweep while the block runs.

    Args:
        folder: Folder of the sweep.
        jobs: Its jobs as in `sweep.json`; none for a search, which chooses them while it runs and prints its own lines.
    """
    console = Console(stderr=True)
    started = time.time()
    if not jobs:
        with _show(console, lambda: search_table(folder, started)) if console.is_terminal else contextlib.nullcontext():
            yield
        return
    watcher = _Watcher(folder, jobs)
    if console.is_terminal:
        with _show(console, lambda: table(watcher.look(), started, watcher.own)):
            yield
    else:
        with _every(INTERVAL, lambda: _report(watcher)):
            yield


def _show(console: Console, render: Callable[[], Group]) -> Live:
    return Live(console=console, get_renderable=render, refresh_per_second=2)


class _Watcher:
    """Reads the files of the jobs; those of a job that has ended are read only once.

    Attributes:
        reported: Numbers of the jobs whose end needs no line, or has had one.
        own: What tells a job from those with the same method, dataset and seed, for each job.
    """

    def __init__(self, folder: Path, jobs: Sequence[PlannedJob]) -> None:
        self.reported: set[int] = set()
        self._folder, self._jobs = folder, jobs
        self._ended: dict[int, Watched] = {}
        self._before: dict[int, str | None] = {}
        self.own = _own_overrides(jobs)
        # Jobs that had ended before need no line; those that had failed before wait to be run again
        for number, record in enumerate(self.look()):
            if record["state"] in (State.FINISHED, State.SKIPPED, State.PRUNED):
                self.reported.add(number)
            elif record["state"] != State.WAITING:
                self._before[number] = record.get("updated")
                self._ended.pop(number, None)

    def look(self) -> list[Watched]:
        """One record for each job, including those that are waiting; `state` is a `State`."""
        return [self._read(number, job) for number, job in enumerate(self._jobs)]

    def _read(self, number: int, job: PlannedJob) -> Watched:
        if number in self._ended:
            return self._ended[number]
        record = job_record.read(self._folder / job["folder"])
        current: Watched = {
            "number": job["number"],
            "label": job["label"],
            "dataset": job["dataset"],
            "seed": job["seed"],
            "skipped": job["skipped"],
            "state": State.SKIPPED if job["skipped"] else State.WAITING,
        }
        if record and record["updated"] != self._before.get(number):
            current = {**current, **_progress(record), "reason": record["reason"]}
        if current["state"] in ENDED and current.get("updated"):
            self._ended[number] = current
        return current


def _progress(record: Record) -> Progress:
    return {
        "state": record["state"],
        "started": record["started"],
        "updated": record["updated"],
        "epoch": record["epoch"],
        "epochs": record["epochs"],
        "val/accuracy": record["val/accuracy"],
    }


def _report(watcher: _Watcher) -> None:
    records = watcher.look()
    for number, record in enumerate(records):
        if record["state"] in ENDED and number not in watcher.reported:
            watcher.reported.add(number)
            line = f"{len(watcher.reported)} of {len(records)}: {describe(record, watcher.own[number])}"
            print(line, file=sys.stderr, flush=True)


def _own_overrides(jobs: Sequence[PlannedJob]) -> list[str]:
    """For each job, the overrides that not all have, where method, dataset and seed do not tell it from another."""
    names = Counter((job["label"], job["dataset"], job["seed"]) for job in jobs)
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if jobs else set()
    own = []
    for job in jobs:
        texts = [text.lstrip("+") for text in job["overrides"] if text not in shared and not text.startswith("seed=")]
        own.append(" ".join(texts) if names[job["label"], job["dataset"], job["seed"]] > 1 else "")
    return own


def describe(record: Watched, own: str = "") -> str:
    """An ended job in one line.

    Args:
        record: Its record.
        own: What tells it from others, where its method, dataset and seed do not.
    """
    job = f"{record['label']} on {record['dataset']}, seed {record['seed']}" + (f", {own}" if own else "")
    if record["state"] == State.FINISHED:
        accuracy = record["val/accuracy"]
        result = f": validation {100 * accuracy:.1f} %" if accuracy is not None else ""
        return f"{job}{result} ({_seconds(record):.0f} s)"
    return f"{job} {record['state']}: {record.get('reason') or record.get('skipped')}"


def table(records: Sequence[Watched], started: float, own: Sequence[str] = ()) -> Group:
    """Failed jobs, the last ones that ended, and running ones; below, the number of ended jobs and the time left.

    Args:
        records: One for each job.
        started: When the sweep was started, in seconds.
        own: What tells a job from those with the same method, dataset and seed, for each job.
    """
    ended = [record for record in records if record["state"] in ENDED]
    failed = [record for record in ended if record["state"] == State.FAILED]
    running = [record for record in records if record["state"] == State.RUNNING]
    waiting = [record for record in records if record["state"] not in (*ENDED, State.RUNNING)]
    others = [record for record in ended if record["state"] != State.FAILED]
    others.sort(key=lambda record: _time(record.get("updated")))
    shown = [*failed[-ROWS:], *others[-max(ROWS - len(failed) - len(running), 1) :], *running, *waiting[:1]]
    told = dict(zip((record["number"] for record in records), own, strict=False)) if any(own) else {}
    rows = _table("job", "method", "dataset", "seed", *(["with"] if told else []))
    for record in shown:
        cells = [str(record["number"]), record["label"], record["dataset"], str(record["seed"])]
        cells += [told[record["number"]]] if told else []
        rows.add_row(*map(cell, cells), *_status(record))
    counts = [f"{len(ended)} of {len(records)} jobs ended"]
    counts += [f"{len(failed)} failed"] if failed else []
    left = remaining(records, started)
    counts += [f"about {_clock(left)} left"] if left else []
    return Group(rows, Text("  " + ", ".join(counts), style="dim"))


def search_table(folder: Path, started: float) -> Group:
    """The trials of a search that run, the last ones that ended and the best, with the values sampled for them."""
    try:
        content = read_search(folder)
    except RecastError:  # the search has not written it yet
        return Group()
    trials = content["trials"]
    ended = [trial for trial in trials if trial["state"] != State.RUNNING]
    best = content["best"]
    shown = [trial for trial in ended[:-ROWS] if best and trial["number"] == best["number"]] + ended[-ROWS:]
    shown += [trial for trial in trials if trial["state"] == State.RUNNING]
    rows = _table("trial", *content["space"])
    records: list[Progress] = []
    for trial in trials:
        record = job_record.read(folder / trial["folder"])
        known: Progress = {"state": trial["state"], "updated": trial["ended"], "epoch": 0, "epochs": 1}
        records.append({**_progress(record), "state": trial["state"]} if record else known)
        if trial in shown:
            sampled = [short(trial["parameters"].get(key, "")) for key in content["space"]]
            number = Text(f"{trial['number']}", style="bold" if best and trial["number"] == best["number"] else "")
            status = _status(records[-1]) if record else (trial["state"], "", "", "")
            rows.add_row(number, *sampled, *status)
    counts = [f"{len(ended)} of {content['n_trials']} trials ended"]
    counts += [f"best {100 * (best['value'] or 0):.1f} % (trial {best['number']})"] if best else []
    waiting: Progress = {"state": State.WAITING, "updated": None}
    left = remaining([*records, *(waiting for _ in range(content["n_trials"] - len(trials)))], started)
    counts += [f"about {_clock(left)} left"] if left else []
    return Group(rows, Text("  " + ", ".join(counts), style="dim"))


def _table(*columns: str) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (*columns, "status", "epoch", "val", "time"):
        right = column in ("job", "trial", "seed", "epoch", "val", "time")
        rows.add_column(column, justify="right" if right else "left", overflow="fold")
    return rows


_COLOURS: dict[str, str] = {State.FINISHED: "green", State.FAILED: "red", State.RUNNING: "bold", State.WAITING: "dim"}


def _status(record: Progress) -> tuple[Text, str, str, str]:
    """State, epochs, validation accuracy and time of a job, for the tables."""
    accuracy = record.get("val/accuracy")
    has_started = record["state"] in (State.RUNNING, State.FINISHED)
    return (
        Text(record["state"], style=_COLOURS.get(record["state"], "")),
        f"{record['epoch']}/{record['epochs']}" if has_started else "",
        f"{100 * accuracy:.1f} %" if accuracy is not None else "",
        _clock(_seconds(record)) if has_started else "",
    )


def remaining(records: Sequence[Progress], started: float) -> float | None:
    """Seconds until the last job ends, at the speed since the sweep was started; None as long as no epoch is done.

    A running job counts by the share of its epochs that are done. Jobs that had ended before do not count.
    """
    before = [record for record in records if record["state"] in ENDED and _time(record.get("updated")) < started - 1]
    done = sum(
        1.0 if record["state"] in ENDED else record["epoch"] / record["epochs"]
        for record in records
        if record not in before and record["state"] in (*ENDED, State.RUNNING)
    )
    if not done:
        return None
    return (time.time() - started) * (len(records) - len(before) - done) / done


@contextlib.contextmanager
def _every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Repeat an action in a thread, and once more at the end."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        action()


def _time(text: str | None) -> float:
    return datetime.datetime.fromisoformat(text).timestamp() if text else 0.0


def _seconds(record: Progress) -> float:
    end = time.time() if record["state"] == State.RUNNING else _time(record["updated"])
    return max(end - _time(record["started"]), 0.0)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
