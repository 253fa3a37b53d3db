"""The table of a report: a row for each method, a column for each dataset. Means never hide missing runs."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from recast_exp.report.methods import method_names
from recast_exp.report.reading import LEFT_OUT, Job
from recast_exp.report.replicates import Replicate, Words, words
from recast_exp.report.tested import has_same_training, is_fair
from recast_exp.runs.state import State

UNPLANNED = "not planned"
PROBE = "probe/test/accuracy"
_ABSENT = {UNPLANNED: UNPLANNED, State.SKIPPED: "does not fit", State.PRUNED: "pruned"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Test accuracies, from 0 to 1, of one method on one dataset.

    Attributes:
        values: Replicate → accuracy, of the runs that count.
        expected: The replicates of all methods on this dataset.
        absent: The state in which all runs of the method were left out, UNPLANNED if there are none, None otherwise.
        reason: The reason why they were left out, as a job has recorded it.
    """

    values: Mapping[Replicate, float]
    expected: tuple[Replicate, ...]
    absent: str | None = None
    reason: str | None = None

    @property
    def complete(self) -> bool:
        """Whether no replicate is missing."""
        return set(self.values) == set(self.expected)

    @property
    def mean(self) -> float | None:
        """Mean over the replicates that have a result; None if there are none."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the replicates (division by n - 1); None if there are fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def note(self) -> str:
        """The missing results, in words; empty if there are none."""
        if self.complete:
            return ""
        if self.absent:
            return _ABSENT[self.absent]
        return f"{len(self.values)} of {len(self.expected)} {words(self.expected).many}"


@dataclasses.dataclass(frozen=True)
class Average:
    """Mean over the datasets, all with the same weight.

    Attributes:
        mean: None if a dataset has no result at all: a mean over fewer datasets is not comparable with the others.
        std: Sample standard deviation over the replicates, of each one's mean over the datasets; complete rows only.
        note: The missing results, in words; empty if there are none.
    """

    mean: float | None
    std: float | None
    note: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A method: its cells, and the size of a task.

    Attributes:
        parameters: Smallest and largest count, over its runs, of trained parameters without the head; None without
            results.
        size: The same in bytes.
        head: The same of the head's parameters.
        gain: Mean difference from the linear probe of the same backbone, images and replicate.
        gain_note: The missing results, in words; empty if there are none.
        runs: (Dataset, replicate) → the run that counts.
    """

    method: str
    cells: Mapping[str, Cell]
    average: Average
    parameters: tuple[int, int] | None
    size: tuple[int, int] | None
    head: tuple[int, int] | None
    gain: float | None
    gain_note: str
    runs: Mapping[tuple[str, Replicate], Job]

    @property
    def values(self) -> dict[tuple[str, Replicate], float]:
        """(Dataset, replicate) → accuracy, of the runs that count."""
        return {(name, each): value for name, cell in self.cells.items() for each, value in cell.values.items()}


@dataclasses.dataclass(frozen=True)
class Results:
    """The jobs of a report, their methods, and the table.

    Attributes:
        methods: The method of each of `jobs`; empty for a job that cannot be read at all.
        counted: Method, dataset and replicate → the run that counts.
        words: What the replicates are called.
        remarks: The omissions, one line each.
    """

    jobs: tuple[Job, ...]
    methods: tuple[str, ...]
    datasets: tuple[str, ...]
    counted: Mapping[tuple[str, str, Replicate], Job]
    words: Words
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]

    @property
    def expected(self) -> int:
        """The number of runs in a complete table: all that were run or planned, except those that were left out."""
        pairs = zip(self.methods, self.jobs, strict=True)
        return len({(name, job.dataset, job.replicate) for name, job in pairs if name and job.state not in LEFT_OUT})

    @property
    def unfinished(self) -> list[tuple[str, Job]]:
        """The jobs without results, and their methods."""
        return [pair for pair in zip(self.methods, self.jobs, strict=True) if not pair[1].finished]


def tabulate(jobs: Sequence[Job]) -> Results:
    """Tabulate the results of all jobs, with methods and datasets in order of appearance."""
    methods = method_names(jobs)
    named = [(name, job) for name, job in zip(methods, jobs, strict=True) if name]
    datasets = tuple(dict.fromkeys(job.dataset for _, job in named))
    replicates = {
        dataset: tuple(
            dict.fromkeys(job.replicate for _, job in named if job.dataset == dataset and job.state not in LEFT_OUT)
        )
        for dataset in datasets
    }
    called = words(job.replicate for _, job in named)
    counted, remarks = _counted(named, called)
    remarks += _trained_apart(counted.values())
    probes = _probes(counted.values())
    rows = []
    for method in dict.fromkeys(name for name, _ in named):
        cells = {dataset: _cell(method, dataset, replicates[dataset], named, counted) for dataset in datasets}
        runs = [job for (name, _, _), job in counted.items() if name == method]
        gain, gain_note = _gain(runs, probes, cells)
        rows.append(
            Row(
                method,
                cells,
                _average(list(cells.values())),
                parameters=_range(runs, lambda job: job.count("task_specific")),
                size=_range(runs, lambda job: -(-job.count("task_bits") // 8)),
                head=_range(runs, lambda job: job.count("head")),
                gain=gain,
                gain_note=gain_note,
                runs={(job.dataset, job.replicate): job for job in runs},
            )
        )
    return Results(tuple(jobs), tuple(methods), datasets, counted, called, tuple(rows), tuple(remarks))


def _counted(
    named: Iterable[tuple[str, Job]], called: Words
) -> tuple[dict[tuple[str, str, Replicate], Job], list[str]]:
    """One run for each method, dataset and replicate: the newest, if a run was repeated."""
    counted: dict[tuple[str, str, Replicate], Job] = {}
    remarks = []
    for name, job in named:
        if not job.finished:
            continue
        key = (name, job.dataset, job.replicate)
        if key in counted:
            older, newer = sorted((counted[key], job), key=lambda run: run.updated)
            numbers = ", ".join(f"{one} {getattr(job, one)}" for one in called.listed)
            remarks.append(
                f"{older.folder} has the settings of {newer.folder} ({name}, {job.dataset}, {numbers}); "
                "the newer one counts"
            )
            job = newer
        counted[key] = job
    return counted, remarks


def _cell(
    method: str,
    dataset: str,
    expected: tuple[Replicate, ...],
    named: Iterable[tuple[str, Job]],
    counted: Mapping[tuple[str, str, Replicate], Job],
) -> Cell:
    values = {each: counted[method, dataset, each].accuracy for each in expected if (method, dataset, each) in counted}
    jobs = [job for name, job in named if name == method and job.dataset == dataset]
    if not jobs:
        return Cell(values, expected, UNPLANNED)
    if all(job.state in LEFT_OUT for job in jobs):
        return Cell(values, expected, jobs[0].state, jobs[0].reason)
    return Cell(values, expected)


def _average(cells: Sequence[Cell]) -> Average:
    means = [cell.mean for cell in cells if cell.mean is not None]
    if len(means) < len(cells):
        return Average(None, None, f"{len(means)} of {len(cells)} datasets")
    mean = statistics.fmean(means)
    if not all(cell.complete for cell in cells):
        present, expected = (
            sum(map(len, counts)) for counts in zip(*((c.values, c.expected) for c in cells), strict=True)
        )
        return Average(mean, None, f"{present} of {expected} runs")
    replicates = set(cells[0].expected)
    if any(set(cell.expected) != replicates for cell in cells) or len(replicates) < 2:
        return Average(mean, None, "")
    return Average(mean, statistics.stdev([statistics.fmean(c.values[each] for c in cells) for each in replicates]), "")


def is_probe(job: Job) -> bool:
    """Whether a job trains only a head."""
    return (job.setting("model", "method"), job.setting("adapter", "name")) == ("frozen", "none")


def is_comparable(first: Job, second: Job) -> bool:
    """Whether two runs of one dataset and replicate may be compared: with a probe, only what it is a probe for."""
    return is_probe(first) == is_probe(second) or is_fair(first, second)


def _probes(jobs: Iterable[Job]) -> dict[tuple[str, Replicate], list[Job]]:
    """Dataset and replicate → the jobs that train only a head."""
    found: dict[tuple[str, Replicate], list[Job]] = defaultdict(list)
    for job in jobs:
        if is_probe(job):
            found[job.dataset, job.replicate].append(job)
    return found


def _of_sweep(run: Job, probes: Mapping[tuple[str, Replicate], Sequence[Job]]) -> float | None:
    """The accuracy of the only job of the sweep that is a probe for a run; None if there is none, or several."""
    fair = [probe for probe in probes.get((run.dataset, run.replicate), ()) if is_fair(run, probe)]
    return fair[0].accuracy if len(fair) == 1 else None


def _trained_apart(jobs: Iterable[Job]) -> list[str]:
    """A remark on the datasets on which not all methods have learnt from the same images."""
    first: dict[tuple[str, Replicate], Job] = {}
    unlike = {
        job.dataset: None
        for job in jobs
        if not has_same_training(job, first.setdefault((job.dataset, job.replicate), job))
    }
    return [
        f"{name}: the training or validation images are not the same in all runs; a run is compared only with a linear "
        "probe of its own images"
        for name in unlike
    ]


def _gain(
    runs: Sequence[Job], probes: Mapping[tuple[str, Replicate], Sequence[Job]], cells: Mapping[str, Cell]
) -> tuple[float | None, str]:
    """Mean difference from the runs' own probes, or from the sweep's if more runs have one; datasets weigh the same.

    Both kinds of probes are never mixed in one row. There is no mean if a whole dataset is missing, unless the method
    was never meant for it: then the note says of how many datasets it is the mean.
    """
    if not runs or any(map(is_probe, runs)):
        return None, ""
    measured = ((job, job.metrics.get(PROBE)) for job in runs)
    of_runs = [(job, float(probe)) for job, probe in measured if isinstance(probe, int | float)]
    of_sweep = [(job, probe) for job in runs if (probe := _of_sweep(job, probes)) is not None]
    pairs = max(of_runs, of_sweep, key=len)
    if not pairs:
        return None, ""
    by_dataset: dict[str, list[float]] = {}
    for job, probe in pairs:
        by_dataset.setdefault(job.dataset, []).append(job.accuracy - probe)
    planned = {dataset: len(cell.expected) for dataset, cell in cells.items() if cell.absent != UNPLANNED}
    of_datasets = f"{len(by_dataset)} of {len(cells)} datasets" if len(by_dataset) < len(cells) else ""
    if set(by_dataset) != set(planned):
        return None, of_datasets
    of_all = f"{len(pairs)} of {count} runs" if len(pairs) < (count := sum(planned.values())) else ""
    note = ", ".join(filter(None, (of_datasets, of_all)))
    return statistics.fmean(map(statistics.fmean, by_dataset.values())), note


def _range(jobs: Sequence[Job], count: Callable[[Job], int]) -> tuple[int, int] | None:
    counts = [count(job) for job in jobs]
    return (min(counts), max(counts)) if counts else None
