"""TensorBoard: the metrics, results and hyperparameters of a run, as event files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from recast_exp.runs import layout
from recast_exp.tracking.base import RunFacts, Tracker

RESULTS = "results"


class TensorBoardRun(TensorBoardLogger, Tracker):
    """The event files of one run.

    Args:
        run_dir: Folder of the run; the event files go to `tensorboard/` in it.
        run: The facts about the run: the columns of TensorBoard's table of hyperparameters.
    """

    def __init__(self, run_dir: Path, run: RunFacts) -> None:
        super().__init__(run_dir, name="", version=layout.TENSORBOARD, default_hp_metric=False)
        self._place = str(run_dir / layout.TENSORBOARD)
        self._facts = run.flat()

    @property
    def log_dir(self) -> str:
        """The folder of the event files, as it stands: Lightning would take `$NAME` in it for a variable."""
        return self._place

    @rank_zero_only
    def report(self, run_dir: Path, summary: Mapping[str, object]) -> None:
        """Log the results of a finished run.

        They go to a separate series, `tensorboard/results`: in the series of the epochs, they would add a point to the
        curves of the same names.

        Args:
            run_dir: Folder of the run, with its plots.
            summary: Name → result.
        """
        measured = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        self.experiment.add_hparams(self._facts, measured, run_name=RESULTS)
        for path in layout.plots(run_dir):
            with Image.open(path) as image:
                self.experiment.add_image(f"plots/{path.stem}", np.asarray(image.convert("RGB")), dataformats="HWC")

    @rank_zero_only
    def close(self, *, failed: bool) -> None:
        """Write the last events to disk and close the files."""
        self.finalize("failed" if failed else "success")
