"""From a folder of runs to its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from recast_exp.display.figures import Point, accuracy_by_parameters
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import user_path, write_text
from recast_exp.report import exports, page
from recast_exp.report.comparing import compare_all
from recast_exp.report.reading import Contents, read_jobs
from recast_exp.report.sequences import TaskSequence, read_sequences
from recast_exp.report.table import Results, tabulate
from recast_exp.report.trials import Search, read_searches
from recast_exp.runs import layout


def write_report(folder: Path) -> Path:
    """Write the report of all jobs below a folder into its folder `report/`; an earlier report is replaced.

    Args:
        folder: A sweep's folder, one with several sweeps in it, or a run's.

    Returns:
        The page, report.html. Next to it are report.md, results.csv and results.parquet (a row for each job),
        comparisons.csv (a row for each pair of methods), table.tex and accuracy.png (accuracy against parameters).

    Raises:
        MissingInputError: If there are no jobs below the folder.
        UserError: If nothing can be written there.
    """
    folder = user_path(folder).resolve()
    contents, searches = read_searches(read_jobs(folder))
    sequences, unread = read_sequences(folder)
    contents = dataclasses.replace(contents, remarks=(*contents.remarks, *unread))
    if not contents.jobs and not searches and not sequences:
        remarks = f" ({'; '.join(contents.remarks)})" if contents.remarks else ""
        raise MissingInputError(
            f"path: expected the folder of a sweep, got {folder}, which holds no run of stage=adapt or sequence"
            f"{remarks}"
        )
    results = tabulate(contents.jobs)
    target = folder / layout.REPORT
    if target.is_symlink():
        raise UserError(f"path: expected the report's own folder in {target}, got a link to {target.readlink()}")
    try:
        _write(target, contents, results, searches, sequences)
    except OSError as error:
        raise UserError(f"path: {target} cannot be written to ({error.strerror})") from error
    return target / "report.html"


def _write(
    target: Path,
    contents: Contents,
    results: Results,
    searches: Sequence[Search],
    sequences: Sequence[TaskSequence],
) -> None:
    rows = exports.records(results)
    exports.write_csv(target / "results.csv", rows)
    exports.write_parquet(target / "results.parquet", rows)
    exports.write_csv(target / "comparisons.csv", exports.comparison_records(compare_all(results)))
    write_text(target / "table.tex", exports.latex(results))
    if panels := _panels(results):
        accuracy_by_parameters(panels, target / "accuracy.png")
    write_text(target / "report.md", page.summary(contents, results, searches, sequences))
    write_text(target / "report.html", page.html(contents, results, searches, sequences))


def _panels(results: Results) -> dict[str, list[Point]]:
    """Dataset → its methods that have results, with the standard errors of their means."""
    panels: dict[str, list[Point]] = {}
    for row in results.rows:
        for name, cell in row.cells.items():
            if cell.mean is not None:
                runs = [
                    job
                    for (method, dataset, _), job in results.counted.items()
                    if (method, dataset) == (row.method, name)
                ]
                error = 0.0 if cell.std is None else cell.std / len(cell.values) ** 0.5
                recast = any(job.setting("model", "method") == "recast" for job in runs)
                parameters = max(job.count("task_specific") for job in runs)
                panels.setdefault(name, []).append(Point(row.method, parameters, cell.mean, error, recast))
    return panels
