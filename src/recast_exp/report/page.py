"""The page of a report: one self-contained HTML file, and its short form in Markdown."""

from __future__ import annotations

import base64
import functools
import gzip
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from recast_exp.report import charts, text
from recast_exp.report.comparing import Comparison, compare_all, compare_with_reference, holm
from recast_exp.report.exports import markdown, table
from recast_exp.report.reading import Found, Job
from recast_exp.report.table import Results
from recast_exp.report.trials import Search, Trial
from recast_exp.runs.state import State

FILES = {"report.md": "Markdown", "results.csv": "CSV", "results.parquet": "Parquet", "table.tex": "LaTeX"}


def html(found: Found, results: Results, searches: Sequence[Search]) -> str:
    """The page, as text."""
    facts = _facts(found, results, searches)
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
    environment.policies["json.dumps_kwargs"] = {
        "allow_nan": False
    }  # and the order of the sweep kept, unlike by default
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
        },
        style=_resource("page.css"),
        script=_resource("page.js"),
        library=_library(),
    )


def summary(found: Found, results: Results, searches: Sequence[Search]) -> str:
    """The report as Markdown: the table, the tests, the searches, what is missing, and how it was made."""
    facts = _facts(found, results, searches)
    parts = [f"# {facts['title']}", facts["status"], *([f"**{facts['warning']}**"] if facts["warning"] else [])]
    if results.rows:
        parts += ["## Test accuracy", _TABLE_SAYS, markdown(table(results))]
    if comparisons := _comparisons(results):
        lines = [
            (
                text.noted(f"{each.first} − {each.second}", each.note),
                text.difference(each.difference),
                text.p_value(each.runs.p if each.runs else None),
                text.p_value(corrected),
                text.p_value(each.datasets.p if each.datasets else None),
            )
            for each, corrected in comparisons
        ]
        head = ("difference", "points", "p (pairs)", "p (pairs), corrected", "p (datasets)")
        parts += ["## Tests", _tests_say(comparisons), markdown([head, *lines])]
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
        parts += [f"## {search.title}", f"{search.status}. {_SEARCH_SAYS}", markdown([columns, *trials])]
        parts += [f"The best setting:\n\n```console\n$ {search.command}\n```"] if search.command else []
    if facts["unfinished"]:
        lines = [(job.folder, name or text.NOTHING, *_where(job), _why(job)) for name, job in facts["unfinished"]]
        parts += ["## Without results", markdown([("job", "method", "dataset", "seed", "why"), *lines])]
    if facts["remarks"]:
        parts += ["## Remarks", "".join(f"- {line}\n" for line in facts["remarks"])]
    parts += ["## How it was made", *(f"```console\n$ {command}\n```" for command in facts["commands"])]
    parts += ["".join(f"- {name}: {', '.join(values)}\n" for name, values in facts["versions"].items())]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


_TABLE_SAYS = (
    "Accuracy in percent on the test images, mean ± sample standard deviation over the seeds. Trained parameters and "
    "bytes are without the head, whose parameters are in the last column."
)


_SEARCH_SAYS = "Trials are compared by validation accuracy. Only the best one is among the test accuracies."


def _outcome(trial: Trial, search: Search) -> str:
    """The outcome of a trial; empty for a finished one that is not the best."""
    if trial.number == search.best:
        return "best"
    return "" if trial.state == State.FINISHED else ": ".join(filter(None, (trial.state, trial.reason)))


def _facts(found: Found, results: Results, searches: Sequence[Search]) -> dict[str, Any]:
    """What page and summary have in common."""
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
        "title": f"Report on {'/'.join(found.folder.parts[-2:])}",
        "status": " · ".join(
            [
                *([f"{len(results.counted)} of {expected} runs finished"] if expected or not searches else []),
                *(search.status for search in searches),
                *rest,
                *([f"as of {latest[:16].replace('T', ' ')}"] if (latest := _latest(found.jobs)) else []),
            ]
        ),
        "warning": _PARTIAL if partial else "",
        "unfinished": unfinished,
        "remarks": [*found.remarks, *results.remarks],
        "commands": found.commands,
        "versions": {name.removeprefix("version/"): values for name, values in versions.items()},
        "folder": str(found.folder),
        "where": _where,
        "why": _why,
        "table_says": _TABLE_SAYS,
        "searches": searches,
        "search_says": _SEARCH_SAYS,
        "outcome": _outcome,
        "tests_say": _tests_say(_comparisons(results)),
    }


_PARTIAL = (
    "Partial: runs are missing. Cells give the number of seeds behind them, and there is an average only where every "
    "dataset has a result."
)


def _comparisons(results: Results) -> list[tuple[Comparison, float | None]]:
    """Every method against the reference, each with its p-value over pairs, corrected for their number."""
    comparisons = compare_with_reference(results)
    corrected = iter(holm([each.runs.p for each in comparisons if each.runs]))
    return [(each, next(corrected) if each.runs else None) for each in comparisons]


def _tests_say(comparisons: Sequence[tuple[Comparison, float | None]]) -> str:
    """What was tested, on how many pairs, and the smallest p-value that these can give."""
    tests = [each for each, _ in comparisons if each.runs]
    if not tests:
        return "There are no two methods with a run of the same dataset and seed."
    most = max(tests, key=lambda each: each.pairs)
    assert most.runs is not None
    says = (
        "Two runs are a pair if they have the same dataset and seed. Two-sided sign-flip permutation tests of the mean "
        f"difference. Over pairs: do the methods differ on these datasets? {most.runs.units} pairs can give "
        f"p = {text.smallest(most.runs)} at best."
    )
    if most.datasets:
        says += (
            " Over datasets: would they differ on other datasets of this kind? All pairs of a dataset change sign "
            f"together; {most.datasets.units} datasets can give p = {text.smallest(most.datasets)} at best."
        )
    else:
        says += " One dataset says nothing about others."
    if len(tests) > 1:
        says += f" The corrected value accounts for {len(tests)} comparisons (Holm)."
    return says


def _all_pairs(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """The comparison of any two methods, by their names."""
    return {
        f"{each.first}|{each.second}": {
            "difference": each.difference,
            "pairs": text.noted(str(each.pairs), each.note),
            "p_pairs": text.p_value(each.runs.p) if each.runs else None,
            "smallest_pairs": text.smallest(each.runs) if each.runs else None,
            "datasets": each.datasets.units if each.datasets else 1,
            "p_datasets": text.p_value(each.datasets.p) if each.datasets else None,
            "smallest_datasets": text.smallest(each.datasets) if each.datasets else None,
        }
        for each in comparisons
        if each.pairs
    }


def _where(job: Job) -> tuple[str, str]:
    return (job.dataset, str(job.seed)) if job.label else (text.NOTHING, text.NOTHING)


def _why(job: Job) -> str:
    """Why a job has no results: its state, how far it came, and the reason."""
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
