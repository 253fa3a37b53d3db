"""Stages: plain functions of a configuration and a folder, one module each, named as the option of `stage=`."""

from __future__ import annotations

import contextlib
import importlib
import logging
from pathlib import Path

from omegaconf import DictConfig

from recast_exp.config.schema import WITHOUT_MODEL, Config, typed

log = logging.getLogger(__name__)


def run(cfg: DictConfig | Config, run_dir: Path, group: str | None = None) -> dict[str, float]:
    """Run the stage of a configuration.

    Args:
        cfg: A composed and checked configuration.
        run_dir: Folder of the run; it exists.
        group: Name of the sweep that the run belongs to, for trackers.

    Returns:
        The run's metrics, flat.

    Raises:
        UserError: If the request cannot be carried out; MissingInputError if data, weights or a bank are missing.
    """
    stage = importlib.import_module(f"{__name__}.{cfg.stage.name}")
    with contextlib.ExitStack() as around:
        if cfg.stage.name not in WITHOUT_MODEL:
            from recast_exp.training.loop import progress_bars, quiet  # heavy: torch and Lightning

            around.enter_context(quiet())
            around.enter_context(progress_bars(group is None))  # those of several jobs would write over one another
        settings = typed(cfg) if isinstance(cfg, DictConfig) and cfg.stage.name != "compare" else cfg
        metrics: dict[str, float] = stage.run(settings, run_dir, group)
    return metrics
