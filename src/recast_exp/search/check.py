"""What is wrong with a request to search, before Optuna is imported and any folder is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.config.schema import Config
from recast_exp.errors import UserError, first_line
from recast_exp.files import user_path

SWEEPER = "optuna"
"""The option of `hydra/sweeper` that searches."""


def problems(settings: Mapping[str, object], given: Sequence[Override]) -> Iterator[str]:
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
            yield f"hydra.sweeper.{name}: expected an integer ≥ 1, got {value!r}"
    seed = settings.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        yield f"hydra.sweeper.seed: expected an integer ≥ 0 and < {2**32}, got {seed!r}"
    storage = str(settings.get("storage"))
    if user_path(storage).is_dir():
        yield f"hydra.sweeper.storage: expected a file, got {storage}, which is a folder"
    searched = [override.key_or_group for override in given if override.is_sweep_override()]
    if not searched:
        yield "search: expected at least one sweep (optimizer.lr=tag(log,interval(1e-4,1e-1))), got none"
    if "seed" in searched:
        yield "seed: cannot be searched over (the luckiest seed would win); expected a single value"
    for override in given:
        if override.key_or_group.startswith("search."):
            yield f"{override.key_or_group}: the search sets it itself; leave it out"


def part_problems(settings: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with the sampler and the pruner of a search; imports Optuna. One line each."""
    from recast_exp.search.study import check_parts

    parts: dict[str, dict[str, object]] = {}
    for name in ("sampler", "pruner"):
        node = settings.get(name)
        try:
            part = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_dict(node) else None
        except OmegaConfBaseException as error:
            yield f"hydra.sweeper.{name}: {first_line(error)}"
            return
        if not isinstance(part, dict):
            yield f"hydra.sweeper.{name}: expected a class of Optuna and its options, got {node!r}"
            return
        parts[name] = {str(option): value for option, value in part.items()}
    try:
        check_parts(**parts)
    except UserError as error:
        yield from error.lines


def trial_problems(settings: Config) -> Iterator[str]:
    """What is wrong with the settings of a trial, beyond what is wrong with those of any job. One line each."""
    if settings.stage["name"] != "adapt":
        yield f"stage: expected adapt in a search, which goes by validation accuracy, got {settings.stage['name']}"
    if settings.probe:
        yield "probe: expected false in a search, got true, which would test the probe before a trial is stopped"
