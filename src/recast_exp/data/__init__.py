"""Datasets, one module each, found by their names.

A dataset is a module of this package with two functions and a preset of the same name under `conf/dataset/`:

- `check(cfg, data_dir)` looks whether the data is there, without importing anything heavy; it raises
  `MissingInputError` with one line that says what was expected where, and where to get it.
- `load(cfg, data_dir)` reads the index and returns an `ImageSet`.

Nothing is registered anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config import DatasetConfig
    from recast_exp.data.base import ImageSet

_INFRASTRUCTURE = frozenset({"base", "datamodule", "loader", "transforms"})


def names() -> list[str]:
    """The names of all datasets, sorted."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - _INFRASTRUCTURE)


def check_dataset(cfg: DatasetConfig, data_dir: str | Path) -> None:
    """Look whether the data of `cfg` is there; cheap, and imports nothing heavy.

    Raises:
        UserError: If there is no such dataset, or it does not take an option of `cfg`.
        MissingInputError: If its data is not where it is expected.
    """
    _module(cfg).check(cfg, Path(data_dir))


def load_dataset(cfg: DatasetConfig, data_dir: str | Path) -> ImageSet:
    """Load the index (or, where they are small, the images) of the dataset of `cfg`.

    Args:
        cfg: The `dataset` node of the configuration.
        data_dir: Root folder of all datasets.

    Raises:
        UserError: If there is no such dataset, it does not take an option of `cfg`, or its index is wrong.
        MissingInputError: If its data is not where it is expected.
    """
    module = _module(cfg)
    module.check(cfg, Path(data_dir))
    image_set: ImageSet = module.load(cfg, Path(data_dir))
    return image_set


def _module(cfg: DatasetConfig) -> ModuleType:
    if cfg.name not in names():
        raise UserError(f"dataset.name: got {cfg.name!r}, takes one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{cfg.name}")
