"""`logger=wandb`: a run of Weights & Biases, online or offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.config.schema import LoggerConfig
from recast_exp.tracking.trackers._options import expect_none

if TYPE_CHECKING:
    from recast_exp.tracking.base import RunFacts, Tracker


def check(logger: LoggerConfig) -> None:
    """Refuse what W&B refuses whenever a run is started.

    Raises:
        UserError: If it cannot read the environment, or the name of the project.
    """
    expect_none(logger)
    from recast_exp.tracking import _wandb_run

    _wandb_run.check(logger)


def start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> Tracker | None:
    """Start the W&B run of a job, or continue it.

    Raises:
        UserError: If no run can be started with `logger.mode=online`.
    """
    expect_none(logger)
    from recast_exp.tracking import _wandb_run

    return _wandb_run.start(logger, run, run_dir)
