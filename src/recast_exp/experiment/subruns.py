"""Runs within a stage, each in a folder of its own: done once, continued where they were stopped, never repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recast_exp.config.schema import Config
from recast_exp.data import load_dataset
from recast_exp.experiment.card import check_images
from recast_exp.runs import layout
from recast_exp.runs import record as job_record
from recast_exp.runs.record import read_results
from recast_exp.runs.results import Results

NEEDED = "val/accuracy", "test/accuracy", "seconds"
"""The metrics that tables show of every run."""


def claim(settings: Config, run_dir: Path) -> bool:
    """Whether a run with these very settings was begun in a folder; what another has left there is removed.

    Raises:
        UserError: If a run could not write there.
    """
    job_record.check_place(run_dir, "hydra.run.dir")
    record = job_record.read(run_dir)
    # One that has only chosen a recipe is gone on with: the stage alone differs
    known = record is not None and not list(job_record.differences({**record, "stage": "adapt"}, settings))
    if not known:
        job_record.clear(run_dir)
    return known


def check_same_images(settings: Config, run_dir: Path) -> None:
    """Refuse a run on other images than there are now: its results would go into one table with those of others.

    Raises:
        UserError: If they are others.
    """
    check_images(run_dir, load_dataset(settings.dataset, settings.data_dir))


def done(settings: Config, run_dir: Path, label: str, work: Callable[[], object]) -> Results:
    """The results of one run: of a finished one as they are, else of `work`, which goes on from a checkpoint.

    Args:
        settings: Its settings.
        run_dir: Its folder.
        label: What tables call its method.
        work: Does the run, and writes its results into the folder.

    Raises:
        UserError: If it is finished, but on other images than there are now.
    """
    if claim(settings, run_dir) and job_record.is_finished(run_dir, NEEDED):
        check_same_images(settings, run_dir)
    else:
        job_record.begin(run_dir, settings, label=label, overrides=[])
        with job_record.ending(run_dir):
            work()
    # For full fine-tuning hundreds of MB, and nothing is left to continue
    layout.checkpoint(run_dir).unlink(missing_ok=True)
    return read_results(run_dir)
