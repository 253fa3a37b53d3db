"""TensorBoard: what a run logs, and its results beside its hyperparameters, as event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from recast_exp.tracking.start import Tracker

RESULTS = "results"


class TensorBoardRun(TensorBoardLogger, Tracker):
    """The event files of one run.

    Args:
        run_dir: Folder of the run; the event files go to `tensorboard/` in it.
        facts: What the run is, flat, as the columns of TensorBoard's table of hyperparameters.
    """

    def __init__(self, run_dir: Path, facts: Mapping[str, Any]) -> None:
        super().__init__(run_dir, name="", version="tensorboard", default_hp_metric=False)
        self._facts = {name: value if isinstance(value, int | float) else str(value) for name, value in facts.items()}

    @rank_zero_only
    def report(self, run_dir: Path, summary: Mapping[str, Any]) -> None:
        """Log the results of a finished run.

        The numbers go to a series of their own, `tensorboard/results`: under the same names, those of the epochs would
        get one more point.

        Args:
            run_dir: Folder of the run, with its plots.
            summary: Name → result.
        """
        numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        self.experiment.add_hparams(self._facts, numbers, run_name=RESULTS)
        for path in sorted((run_dir / "plots").glob("*.png")):
            with Image.open(path) as image:
                self.experiment.add_image(f"plots/{path.stem}", np.asarray(image.convert("RGB")), dataformats="HWC")

    @rank_zero_only
    def close(self, *, failed: bool) -> None:
        """Write the last events to disk and close the files."""
        self.finalize("failed" if failed else "success")
