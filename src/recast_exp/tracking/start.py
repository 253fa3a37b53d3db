"""The tracker of a job: found by its name, started before the work, given the results, and always closed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from recast_exp.config.schema import Config, LoggerConfig
from recast_exp.errors import Pruned, UserError, section
from recast_exp.models.label import method_label
from recast_exp.plugins import TRACKERS
from recast_exp.runs import record as job_record
from recast_exp.system import is_main_process
from recast_exp.tracking.base import RunFacts, Tracker
from recast_exp.tracking.wandb_sync import how_to_sync

log = logging.getLogger(__name__)


@contextlib.contextmanager
def tracked(settings: Config, run_dir: Path, group: str | None) -> Iterator[list[Tracker]]:
    """Start the tracker of a job, and close it when the block ends: as failed if it ends with an exception.

    Args:
        settings: The whole configuration.
        run_dir: Folder of the run.
        group: Folder of the sweep that the run belongs to, if any.

    Yields:
        The tracker that the configuration names, if any. `metrics.csv` is always written, by
        `training.history.History`.

    Raises:
        UserError: If there is no such tracker, or it refuses its settings.
    """
    tracker = start(settings.logger, facts(settings, group), run_dir)
    trackers = [tracker] if tracker else []
    failed = True
    try:
        yield trackers
        failed = False
    except Pruned:  # its search has stopped the trial: no failure
        failed = False
        raise
    finally:
        for tracker in trackers:
            tracker.close(failed=failed)
        # A sweep prints this once, for all its jobs
        if failed and group is None and is_main_process(settings.trainer.devices):
            say_how_to_sync(run_dir)


def check(logger: LoggerConfig) -> None:
    """Let the tracker that `logger.name` names look at its settings, before anything is written.

    Raises:
        UserError: If there is no such tracker, or it refuses its settings.
    """
    with section("logger."):
        module = TRACKERS.load(logger.name)
    if callable(found := getattr(module, "check", None)):
        found(logger)


def start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> Tracker | None:
    """Start the tracker that `logger.name` names. Only this one is imported, as importing W&B takes seconds.

    Raises:
        UserError: If there is no such tracker, or it refuses its settings.
    """
    with section("logger."):
        module = TRACKERS.load(logger.name)
    if not callable(getattr(module, "start", None)):
        raise UserError(
            f"logger.name: expected the module {module.__name__} of tracker {logger.name} to have the function start, "
            "got none"
        )
    tracker: Tracker | None = module.start(logger, run, run_dir)
    return tracker


def facts(settings: Config, group: str | None = None) -> RunFacts:
    """The facts about a run that its tracker receives.

    Args:
        settings: The whole configuration.
        group: Folder of the sweep that the run belongs to, if any.
    """
    return RunFacts(
        method=method_label(settings.label, settings.model, settings.adapter),
        model=settings.model.name,
        adapter=str(settings.adapter["name"]),
        dataset=settings.dataset.name,
        seed=settings.seed,
        stage=str(settings.stage["name"]),
        config=dataclasses.asdict(settings),
        group="/".join(Path(group).parts[-2:]) if group else None,
    )


def report_results(trackers: Sequence[Tracker], run_dir: Path) -> None:
    """Send the results of a finished run to its trackers: metrics, counts, plots, the task file."""
    summary = results(run_dir) if trackers else {}
    for tracker in trackers:
        tracker.report(run_dir, summary)


def results(run_dir: Path) -> dict[str, object]:
    """The results of a run, flat: those of metrics.json under their own names, the counts as `parameters/…`."""
    metrics, counts = job_record.read_results(run_dir)
    flat: dict[str, object] = dict(metrics)
    return flat | {f"parameters/{name}": count for name, count in counts.items() if not isinstance(count, dict)}


def say_how_to_sync(folder: Path) -> None:
    """Log how to upload the offline W&B runs below a folder, if there are any. It is the last line of a stage."""
    if command := how_to_sync(folder):
        log.info("W&B is offline; upload with: %s", command)
