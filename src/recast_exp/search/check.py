"""What is wrong with a request to search, before Optuna is imported and any folder is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

SWEEPER = "optuna"
"""The option of `hydra/sweeper` that searches."""


def problems(settings: Mapping[str, Any], given: Sequence[Override]) -> Iterator[str]:
    """Check a search as a whole; its keys and values are checked as those of any sweep.

    Args:
        settings: The node `hydra.sweeper`.
        given: The overrides, those of files among them.

    Yields:
        One line for each problem.
    """
    if importlib.util.find_spec("optuna") is None:
        yield "search: Optuna is not installed; pip install 'recast-exp[search]'"
    for name in ("n_trials", "n_jobs"):
        value = settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"hydra.sweeper.{name}: got {value!r}, takes a whole number ≥ 1"
    if not isinstance(settings.get("seed"), int):
        yield f"hydra.sweeper.seed: got {settings.get('seed')!r}, takes a whole number"
    searched = [override.key_or_group for override in given if override.is_sweep_override()]
    if not searched:
        yield "search: got nothing to search; takes at least one sweep (optimizer.lr=tag(log,interval(1e-4,1e-1)))"
    if "seed" in searched:
        yield "seed: got a sweep in a search, which would choose the luckiest; takes one seed for all trials"
    for override in given:
        if override.key_or_group.startswith("search."):
            yield f"{override.key_or_group}: is set by the search itself; leave it out"


def trial_problems(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with the configuration of a trial, beyond what is wrong with that of any job. One line each."""
    if cfg.stage.name != "adapt":
        yield f"stage: got {cfg.stage.name} in a search, which goes by validation accuracy; takes adapt"
    if cfg.probe:
        yield "probe: got true in a search, which would test it before a trial is stopped; takes false"
