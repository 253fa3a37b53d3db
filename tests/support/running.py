"""A stage in this process, without Hydra around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recast_exp import stages
from recast_exp.config.compose import Composer
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.training.trainer import progress_bars, quiet


def run_stage(settings: Config, folder: Path, group: str | None = None, typed: Sequence[str] = ()) -> dict[str, Any]:
    """Run the stage of some settings; `typed` are the overrides that made them, where a stage composes others."""
    job = stages.Job(settings, folder, group, lambda: Variants(Composer(), list(typed)))
    with quiet(), progress_bars(group is None):
        return stages.from_config(settings.stage).run(job)
