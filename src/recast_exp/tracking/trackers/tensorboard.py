"""`logger=tensorboard`: event files in the folder of the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.config.schema import LoggerConfig
from recast_exp.tracking.trackers._options import expect_none as check

if TYPE_CHECKING:
    from recast_exp.tracking.base import RunFacts, Tracker

__all__ = ["check", "start"]


def start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> Tracker | None:
    """Open the event files of a run."""
    check(logger)
    from recast_exp.tracking._tensorboard_run import TensorBoardRun

    return TensorBoardRun(run_dir, run)
