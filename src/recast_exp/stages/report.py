"""`stage=report`: one page, and tables, of all runs below a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recast_exp.report.build import write_report

log = logging.getLogger(__name__)


def run(cfg: DictConfig, run_dir: Path, group: str | None = None) -> dict[str, Any]:
    """Write the report of the folder `path` into it; nothing is trained, and nothing but records is read.

    Raises:
        MissingInputError: If there are no runs below the folder.
    """
    page = write_report(Path(cfg.path))
    log.info("Report: %s", page)
    return {}
