"""Results for other programs and for papers: a row for each job as CSV and Parquet, the table as Markdown and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import pyarrow as pa
from pyarrow import parquet

from recast_exp.files import replacing, write_text
from recast_exp.report import text
from recast_exp.report.comparing import Comparison
from recast_exp.report.table import Average, Cell, Results

_COLUMNS = ("method", "label", "dataset", "seed", "draw", "state", "counts", "reason", "folder", "overrides", "updated")
_CLASSWISE = "test/accuracy_per_class/"  # left out: it would take a column for each class of all datasets
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "·": r"$\cdot$",
    "–": "--",
    "×": r"$\times$",
    "…": r"\dots{}",
}


Record = dict[str, str | float | None]
"""A row: flat, as tables of other programs are."""


def records(results: Results) -> list[Record]:
    """One flat record for each job, finished or not, all with the same keys.

    The names of metrics are those of metrics.json; those of parameters.json begin with `parameters/`. `counts` is true
    if the table includes the job. Accuracies run from 0 to 1.
    """
    counted = {job.folder for job in results.counted.values()}
    rows: list[Record] = []
    for method, job in zip(results.methods, results.jobs, strict=True):
        counts = {f"parameters/{name}": value for name, value in job.parameters.items() if _is_flat(value)}
        metrics = {
            name: value for name, value in job.metrics.items() if _is_flat(value) and not name.startswith(_CLASSWISE)
        }
        readable = method != ""
        rows.append(
            {
                "method": method or None,
                "label": job.label or None,
                "dataset": job.dataset or None,
                "seed": job.seed if readable else None,
                "draw": job.draw if readable else None,
                "state": job.state.value,
                "counts": job.folder in counted,
                "reason": job.reason,
                "folder": job.folder,
                "overrides": " ".join(job.overrides),
                "updated": job.updated or None,
                **metrics,
                **counts,
            }
        )
    names = dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)])
    return [{name: row.get(name) for name in names} for row in rows]


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    """Write records with the same keys as CSV; null becomes an empty field, and floats are exact to the last bit."""
    output = io.StringIO()
    writer = csv.DictWriter(output, list(rows[0]) if rows else list(_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)
    write_text(path, output.getvalue())


def _plain(value: object) -> object:
    """A text that no spreadsheet takes for a formula: a label may be anybody's."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def write_parquet(path: Path, rows: Sequence[Record]) -> None:
    """Write records with the same keys as Parquet; a column of integers and floats becomes one of floats."""
    columns = {name: _column([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    with replacing(path) as temporary, temporary.open("wb") as file:  # pyarrow takes no path that is not UTF-8
        parquet.write_table(pa.table(columns), file)


def comparison_records(comparisons: Sequence[Comparison]) -> list[Record]:
    """One flat record for each pair of methods."""
    return [
        {
            "first": comparison.first,
            "second": comparison.second,
            "difference": comparison.difference,
            "interval_low": comparison.interval[0] if comparison.interval else None,
            "interval_high": comparison.interval[1] if comparison.interval else None,
            "pairs": comparison.pairs,
            "possible_pairs": comparison.possible,
            "p_pairs": comparison.runs.p if comparison.runs else None,
            "smallest_p_pairs": comparison.runs.smallest if comparison.runs else None,
            "datasets": comparison.datasets.units if comparison.datasets else int(comparison.pairs > 0),
            "p_datasets": comparison.datasets.p if comparison.datasets else None,
            "smallest_p_datasets": comparison.datasets.smallest if comparison.datasets else None,
        }
        for comparison in comparisons
    ]


@dataclasses.dataclass(frozen=True)
class Shown:
    """A cell of the table as strings.

    Attributes:
        value: A name or a number.
        note: A note on missing results; empty if there are none.
    """

    value: str
    note: str = ""

    def __str__(self) -> str:
        return text.noted(self.value, self.note)


def table(results: Results) -> list[list[Shown]]:
    """The table as strings, header first."""
    averaged, compared = len(results.datasets) > 1, any(row.gain is not None for row in results.rows)
    header = [*results.datasets, *(["average"] if averaged else []), *(["to the probe"] if compared else [])]
    lines = [[Shown(name) for name in ("method", "parameters", "bytes", *header, "head")]]
    for row in results.rows:
        measured: list[Cell | Average] = [row.cells[name] for name in results.datasets]
        measured += [row.average] if averaged else []
        cells = [Shown(text.accuracy(cell.mean, cell.std), cell.note) for cell in measured]
        cells += [Shown(text.difference(row.gain), row.gain_note)] if compared else []
        parameters, size, head = (Shown(text.count(span)) for span in (row.parameters, row.size, row.head))
        lines.append([Shown(row.method), parameters, size, *cells, head])
    return lines


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """Rows of strings, header first, as a table in Markdown; all columns but the first are aligned to the right."""
    head, *body = [[_markdown_escaped(str(cell)) for cell in row] for row in rows]
    ruler = [":--", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ruler, *body))


def latex(results: Results) -> str:
    r"""The table for a paper: a `tabular` of booktabs (`\usepackage{booktabs}`), with comments on its contents."""
    cells = table(results)
    head, *body = [[latex_escaped(str(cell)) for cell in row] for row in cells]
    partial = any(cell.note for row in cells for cell in row)
    lines = [
        r"% needs \usepackage{booktabs}",
        f"% test accuracy in percent, mean and sample standard deviation over the {results.words.many}; parameters and "
        "bytes of",
        "% a task without its head" + ("; PARTIAL: brackets count the results behind a value" if partial else ""),
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex_escaped(value: str) -> str:
    """A string in which every character with a meaning in LaTeX is escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in value)


def _markdown_escaped(value: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", " ".join(value.split()))


def _is_flat(value: object) -> TypeGuard[str | float]:
    return isinstance(value, str | int | float | bool)


def _column(values: Sequence[str | float | None]) -> pa.Array:
    """A column of one type: strings if the metrics of several versions have different types."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if len(kinds) > 1:
        return _texts([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return _texts(values) if kinds == {str} else pa.array(values)


def _texts(values: Sequence[object]) -> pa.Array:
    """Strings, in which what is no text (half a surrogate pair) is written as its code."""
    return pa.array(
        [None if value is None else str(value).encode(errors="backslashreplace").decode() for value in values]
    )
