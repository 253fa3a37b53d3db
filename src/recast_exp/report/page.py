"""The page of a report: one self-contained HTML file, and its short form in Markdown."""

from __future__ import annotations

import base64
import functools
import gzip
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from typing import TypedDict

import jinja2
from plotly.offline import get_plotlyjs

from recast_exp.report import charts, text
from recast_exp.report.comparing import CONFIDENCE, Comparison, compare_all, compare_with_reference, holm
from recast_exp.report.exports import markdown, table
from recast_exp.report.reading import Contents, Job
from recast_exp.report.replicates import Words
from recast_exp.report.sequences import COLUMNS, TaskSequence, sequence_figures
from recast_exp.report.table import Results
from recast_exp.report.trials import Search, Trial
from recast_exp.runs.state import State

FILES = {"report.md": "Markdown", "results.csv": "CSV", "results.parquet": "Parquet", "table.tex": "LaTeX"}


class Facts(TypedDict):
    """What page and summary share."""

    title: str
    status: str
    warning: str
    unfinished: Sequence[tuple[str, Job]]
    remarks: list[str]
    commands: tuple[str, ...]
    versions: dict[str, list[str]]
    folder: str
    words: Words
    where: Callable[[Job], list[str]]
    why: Callable[[Job], str]
    table_hint: str
    searches: Sequence[Search]
    search_hint: str
    outcome: Callable[[Trial, Search], str]
    tests_hint: str


def _line(text: str) -> str:
    """A text within a fence of Markdown, which it must not end."""
    return " ".join(text.replace("`", "'").split())


def html(
    contents: Contents, results: Results, searches: Sequence[Search], sequences: Sequence[TaskSequence] = ()
) -> str:
    """The page, as a string."""
    facts = _facts(contents, results, searches, sequences)
    methods = [row.method for row in results.rows]
    styles = charts.style(methods)
    curves, unread = charts.curve_figures(results, styles)
    coefficients, damaged = charts.coefficient_figures(results)
    facts["remarks"] += [*unread, *damaged]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("recast_exp.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["text"] = text
    # Jinja's default also sets `sort_keys`; without it, the order of the sweep is kept
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.get_template("page.html.jinja").render(
        **facts,
        rows=results.rows,
        datasets=results.datasets,
        averaged=len(results.datasets) > 1,
        compared=any(row.gain is not None for row in results.rows),
        comparisons=_comparisons(results),
        all_pairs=_all_pairs(compare_all(results)),
        files=FILES,
        styles=styles,
        # The keys of the figures are the choices above a chart
        charts={
            "trials": charts.search_figures(searches),
            "accuracy": charts.accuracy_figures(results, styles),
            "curves": curves,
            "coefficients": coefficients,
            "sequences": sequence_figures(sequences),
        },
        sequences=sequences,
        sequence_hint=SEQUENCE_HINT,
        sequence_columns=COLUMNS,
        style=_resource("page.css"),
        script=_resource("page.js"),
        library=_library(),
    )


def summary(
    contents: Contents, results: Results, searches: Sequence[Search], sequences: Sequence[TaskSequence] = ()
) -> str:
    """The report as Markdown: the table, the tests, the searches, jobs without results, commands and versions."""
    facts = _facts(contents, results, searches, sequences)
    parts = [f"# {facts['title']}", facts["status"], *([f"**{facts['warning']}**"] if facts["warning"] else [])]
    if results.rows:
        parts += ["## Test accuracy", facts["table_hint"], markdown(table(results))]
    if comparisons := _comparisons(results):
        lines = [
            (
                text.noted(f"{comparison.first} − {comparison.second}", comparison.note),
                text.noted(text.difference(comparison.difference), text.interval(comparison.interval)),
                text.p_value(comparison.runs.p if comparison.runs else None),
                text.p_value(corrected),
                text.p_value(comparison.datasets.p if comparison.datasets else None),
            )
            for comparison, corrected in comparisons
        ]
        head = ("difference", "points", "p (pairs)", "p (pairs), corrected", "p (datasets)")
        parts += ["## Tests", facts["tests_hint"], markdown([head, *lines])]
    for search in searches:
        trials = [
            (
                str(trial.number),
                text.accuracy(trial.accuracy),
                str(trial.epochs or text.NOTHING),
                *(text.sampled(trial.parameters.get(key)) for key in search.space),
                _outcome(trial, search),
            )
            for trial in search.ranked
        ]
        columns = ("trial", "validation accuracy", "epochs", *search.space, "outcome")
        parts += [f"## {search.title}", f"{search.status}. {_SEARCH_HINT}", markdown([columns, *trials])]
        parts += [f"The best setting:\n\n```console\n$ {search.command}\n```"] if search.command else []
    for sequence in sequences:
        parts += [f"## {sequence.title}", SEQUENCE_HINT, markdown([COLUMNS, *sequence.rows])]
    if facts["unfinished"]:
        where = facts["where"]
        left = [(job.folder, name or text.NOTHING, *where(job), _why(job)) for name, job in facts["unfinished"]]
        names = ("job", "method", "dataset", *results.words.listed, "why")
        parts += ["## Without results", markdown([names, *left])]
    if facts["remarks"]:
        parts += ["## Remarks", "".join(f"- {line}\n" for line in facts["remarks"])]
    parts += ["## Commands and versions", *(f"```console\n$ {_line(command)}\n```" for command in facts["commands"])]
    versions = {name: ", ".join(values) for name, values in facts["versions"].items()}
    parts += ["".join(f"- `{_line(name)}`: `{_line(values)}`\n" for name, values in versions.items())]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


SEQUENCE_HINT = (
    "Test accuracy in percent after the last task, as the mean over the tasks; parameters of all tasks, without heads."
)


def _table_hint(words: Words) -> str:
    return (
        f"Accuracy in percent on the test images, mean ± sample standard deviation over the {words.vary}. Trained "
        "parameters and bytes are without the head, whose parameters are in the last column."
    )


_SEARCH_HINT = "Trials are compared by validation accuracy. Only the best trial is listed under test accuracy."


def _outcome(trial: Trial, search: Search) -> str:
    """The outcome of a trial; empty for a finished one that is not the best."""
    if trial.number == search.best:
        return "best"
    return "" if trial.state == State.FINISHED else ": ".join(filter(None, (trial.state, trial.reason)))


def _facts(
    contents: Contents, results: Results, searches: Sequence[Search], sequences: Sequence[TaskSequence]
) -> Facts:
    """The facts that page and summary share."""
    unfinished = results.unfinished
    states = Counter(job.state for _, job in unfinished)
    skipped = states.pop(State.SKIPPED, 0)
    rest = [*(f"{count} {state}" for state, count in states.items()), *([f"{skipped} left out"] if skipped else [])]
    versions: dict[str, list[str]] = {}
    for job in results.counted.values():
        for name, value in job.metrics.items():
            if (name.startswith("version/") or name == "device") and str(value) not in versions.setdefault(name, []):
                versions[name].append(str(value))
    expected = results.expected
    partial = any(not cell.complete and not cell.absent for row in results.rows for cell in row.cells.values())
    return {
        "title": f"Report on {'/'.join(contents.folder.parts[-2:])}",
        "status": " · ".join(
            [
                *(
                    [f"{len(results.counted)} of {expected} runs finished"]
                    if expected or not (searches or sequences)
                    else []
                ),
                *([f"{len(sequences)} sequence(s) of tasks"] if sequences else []),
                *(search.status for search in searches),
                *rest,
                *([f"as of {latest[:16].replace('T', ' ')}"] if (latest := _latest(contents.jobs)) else []),
            ]
        ),
        "warning": _partial(results.words) if partial else "",
        "unfinished": unfinished,
        "remarks": [*contents.remarks, *results.remarks],
        "commands": contents.commands,
        "versions": {name.removeprefix("version/"): values for name, values in versions.items()},
        "folder": str(contents.folder),
        "words": results.words,
        "where": lambda job: _where(job, results.words),
        "why": _why,
        "table_hint": _table_hint(results.words),
        "searches": searches,
        "search_hint": _SEARCH_HINT,
        "outcome": _outcome,
        "tests_hint": _tests_hint(_comparisons(results), results.words),
    }


def _partial(words: Words) -> str:
    return (
        f"Partial: runs are missing. Cells give the number of {words.many} that they are based on, and there is an "
        "average only if every dataset has a result."
    )


def _comparisons(results: Results) -> list[tuple[Comparison, float | None]]:
    """Every method against the reference, each with its p-value over pairs, corrected for their number."""
    comparisons = compare_with_reference(results)
    corrected = iter(holm([comparison.runs.p for comparison in comparisons if comparison.runs]))
    return [(comparison, next(corrected) if comparison.runs else None) for comparison in comparisons]


def _tests_hint(comparisons: Sequence[tuple[Comparison, float | None]], words: Words) -> str:
    """The description of the tests: their questions, the number of pairs, and the smallest possible p-value."""
    tests = [comparison for comparison, _ in comparisons if comparison.runs]
    if not tests:
        return f"No two methods have runs with the same {words.same} and, for a linear probe, the same training images."
    most = max(tests, key=lambda comparison: comparison.pairs)
    assert most.runs is not None
    hint = f"Two runs are a pair if they have the same {words.same}."
    if any(comparison.interval for comparison in tests):
        hint += (
            f" In brackets is the {100 * CONFIDENCE:.0f} % interval of the difference (Student's t), which covers the "
            f"variation over {words.vary}, not other test images or datasets."
        )
    hint += (
        " Two-sided sign-flip permutation tests of the mean difference. Over pairs: do the methods differ on these "
        f"datasets? With {most.runs.units} pairs, the smallest possible p is {text.smallest(most.runs)}."
    )
    if most.datasets:
        hint += (
            " Over datasets: would they differ on other datasets of this kind? All pairs of a dataset change sign "
            f"together. With {most.datasets.units} datasets, the smallest possible p is {text.smallest(most.datasets)}."
        )
    else:
        hint += " One dataset allows no conclusion about others."
    if len(tests) > 1:
        hint += f" The corrected value accounts for {len(tests)} comparisons (Holm)."
    return hint


def _all_pairs(comparisons: Sequence[Comparison]) -> dict[str, dict[str, object]]:
    """The comparisons of all pairs of methods, by their names."""
    return {
        f"{comparison.first}|{comparison.second}": {
            "difference": comparison.difference,
            "interval": comparison.interval,
            "pairs": comparison.note.removesuffix(" pairs") or str(comparison.pairs),
            "p_pairs": text.p_value(comparison.runs.p) if comparison.runs else None,
            "smallest_pairs": text.smallest(comparison.runs) if comparison.runs else None,
            "datasets": comparison.datasets.units if comparison.datasets else 1,
            "p_datasets": text.p_value(comparison.datasets.p) if comparison.datasets else None,
            "smallest_datasets": text.smallest(comparison.datasets) if comparison.datasets else None,
        }
        for comparison in comparisons
        if comparison.pairs
    }


def _where(job: Job, words: Words) -> list[str]:
    """The dataset of a job, and the numbers that tell it from its replicates."""
    names = ("dataset", *words.listed)
    return [str(getattr(job, name)) if job.label else text.NOTHING for name in names]


def _why(job: Job) -> str:
    """The explanation of a job without results: its state, its progress, and the reason."""
    state = "left out" if job.state == State.SKIPPED else str(job.state)
    return ": ".join([", ".join(filter(None, (state, job.progress))), *([job.reason] if job.reason else [])])


def _latest(jobs: Sequence[Job]) -> str:
    return max((job.updated for job in jobs), default="")


@functools.cache
def _library() -> str:
    """Plotly's script, compressed to a third of its size; the page unpacks it."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()


def _resource(name: str) -> str:
    return resources.files("recast_exp.report").joinpath("templates", name).read_text(encoding="utf-8")
