"""A sweep around its jobs: it is held, watched and run, and at its end a table and a report say what came of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from recast_exp.cli.check import Findings
from recast_exp.cli.job import JobRunner, job_label
from recast_exp.cli.outcome import guarded, report_errors
from recast_exp.config import hydra_api
from recast_exp.display.console import show_failures, show_search, show_skipped, show_sweep
from recast_exp.display.live import watching
from recast_exp.errors import MissingInputError, RecastError
from recast_exp.report.build import write_report
from recast_exp.runs.plan import recipe_sources
from recast_exp.runs.state import State
from recast_exp.runs.sweep import Plan, all_records, collect, command_again, holding, read_search, searched
from recast_exp.tracking.wandb_sync import how_to_sync

log = logging.getLogger(__name__)


def run_sweep(argv: Sequence[str], findings: Findings) -> int:
    """Run a sweep, in its folder alone, and say at its end what came of it.

    Args:
        argv: The arguments of the command.
        findings: What its check has found: nothing wrong, and its jobs.

    Returns:
        The exit code.
    """
    assert findings.sweep_dir is not None
    assert findings.composer is not None
    loader, jobs = findings.composer.loader, findings.jobs if findings.is_grid else []
    labels = [job_label(job.settings) for job in jobs]
    runner = JobRunner({job.asked.overrides: recipe_sources(job.sources) for job in jobs})
    loader.jobs = {job.asked.overrides: job.content for job in jobs}
    again = command_again(argv, findings.sweep_dir)
    search: object = None

    def start() -> None:
        nonlocal search
        assert findings.composer is not None
        search = hydra_api.sweep(loader, findings.composer.whole(findings.overrides, multirun=True), runner)

    try:
        with holding(findings.sweep_dir, jobs, labels, argv) as plan, watching(findings.sweep_dir, plan.jobs):
            loader.file = plan.file
            code = guarded(start, runner)
    except RecastError as error:
        return report_errors(error.lines, error.exit_code)
    except KeyboardInterrupt:
        print(f"interrupted; continue with: {again}", file=sys.stderr)
        return 130
    if isinstance(search, dict):  # a trial failed in another process, or in an earlier run of the search
        failed = (trial for trial in search["trials"] if trial["state"] == State.FAILED)
        code = max([code, *(trial["exit_code"] or 1 for trial in failed)])
    return max(code, _conclude(plan))


def _conclude(plan: Plan) -> int:
    """Say what came of a sweep: a table of its settings, and what failed and how to go on.

    Returns:
        The exit code: 0 if no job failed.
    """
    if not plan.jobs and (written := searched(plan.folder)) is not None:
        if written != plan.searched:  # else it was refused, and nothing has happened
            show_search(plan.folder, read_search(plan.folder))
            _end(plan.folder)
        return 0  # a search has its own exit code
    settings = collect(plan.folder, plan.jobs)
    if settings:
        show_sweep(plan.folder, settings)
    else:
        print(f"Sweep {plan.folder}")
    jobs = all_records(plan)
    skipped = [record for record in jobs if record["state"] == State.SKIPPED]
    if skipped:
        show_skipped(skipped)
    left = [record for record in jobs if record["state"] not in (State.FINISHED, State.SKIPPED)]
    if left:
        shared = set.intersection(*(set(record["overrides"]) for record in jobs))
        for record in left:
            own = [text for text in record["overrides"] if text not in shared and not text.startswith("seed=")]
            record["label"] = " · ".join([record["label"], *own])
        show_failures(left, len(plan.jobs), plan.again)
    _end(plan.folder)
    return max((record["exit_code"] or 1 for record in left), default=0)


def _end(folder: Path) -> None:
    """Write the report of a sweep, and say how to upload what its trackers keep."""
    _report(folder)
    if command := how_to_sync(folder):
        print(f"W&B is offline; upload with: {command}")


def _report(folder: Path) -> None:
    """Write the report of a sweep; that it cannot be written is no failure of the sweep."""
    try:
        print(f"Report: {write_report(folder)}")
    except MissingInputError:  # no job of a stage that has results
        pass
    except RecastError as error:
        log.warning("no report: %s", error)
