"""A stage in this process, without Hydra around it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def run_commands(*commands: Sequence[str]) -> None:
    """Run commands one after another in one process of their own: starting it takes longer than they do."""
    code = (
        "import json, sys\n"
        "from recast_exp.cli.main import run\n"
        "codes = [run(arguments) for arguments in json.loads(sys.argv[1])]\n"
        "assert not any(codes), codes\n"
    )
    given = json.dumps([list(command) for command in commands])
    subprocess.run([sys.executable, "-c", code, given], check=True, env=dict(os.environ), timeout=240)
