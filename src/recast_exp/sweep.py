"""What a sweep says at its end: one row for each setting, mean and spread over its seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf


class SweepSummary(Callback):
    """Hydra calls it when the last job of a sweep has ended."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table, where any job has results."""
        from recast_exp.console import show_sweep

        folder = Path(config.hydra.sweep.dir)
        settings = collect(folder)
        if settings:
            show_sweep(folder, settings)


def collect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished jobs of a sweep, by their overrides without the seed.

    Returns:
        Setting → one entry per job: its metrics, and its counts under `parameters`. Jobs without results are left out.
    """
    settings: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for job in sorted((path.parent for path in folder.glob("*/metrics.json")), key=lambda path: _number(path.name)):
        overrides = [str(text) for text in OmegaConf.load(job / ".hydra" / "overrides.yaml")]
        setting = " ".join(text for text in overrides if not text.startswith("seed=")) or "(defaults)"
        metrics = json.loads((job / "metrics.json").read_text(encoding="utf-8"))
        parameters = json.loads((job / "parameters.json").read_text(encoding="utf-8"))
        settings[setting].append({**metrics, "parameters": parameters})
    return dict(settings)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _number(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (10**9, name)
