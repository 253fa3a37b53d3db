"""`stage=report`: one page, and tables, of all runs below a folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from recast_exp.config.schema import Config
from recast_exp.errors import UserError
from recast_exp.report.build import write_report

log = logging.getLogger(__name__)


def run(settings: Config, run_dir: Path, group: str | None = None) -> dict[str, Any]:
    """Write the report of the folder `path` into it; nothing is trained, and nothing but records is read.

    Raises:
        UserError: If no folder is given.
        MissingInputError: If there are no runs below the folder.
    """
    if settings.path is None:
        raise UserError("path: expected a folder of runs (path=multirun/…), got nothing")
    page = write_report(Path(settings.path))
    log.info("Report: %s", page)
    return {}
