"""`logger=csv`: no tracker alongside `metrics.csv`, which every run has. `logger=none` is another name for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.config.schema import LoggerConfig
from recast_exp.tracking.trackers._options import expect_none as check

if TYPE_CHECKING:
    from recast_exp.tracking.base import RunFacts, Tracker

__all__ = ["check", "start"]


def start(logger: LoggerConfig, run: RunFacts, run_dir: Path) -> Tracker | None:
    """Start nothing."""
    check(logger)
    return None
