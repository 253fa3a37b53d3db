"""Datasets, one module each, found by their names.

A dataset is a module of this package and a preset of the same name under `conf/dataset/`. The module has

- `check(cfg, data_dir)`: look whether the data is there, without importing anything heavy; it raises
  `MissingInputError` with one line that says what was expected where, and where to get it;
- `read(cfg, data_dir)`: read the index, and return the set as it was published, an `Official`;
- `layout(cfg)`, for a set that is published: its `Layout`, with what can be downloaded and verified. A module without
  it may download in `read`.

What is chosen from it (splits, classes, shots) is the same for all, in `protocol.py`. Nothing is registered anywhere
else.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from recast_exp.data import sets
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig
    from recast_exp.data.types import ImageSet, Layout, Official


def names() -> list[str]:
    """The names of all datasets, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(sets.__path__) if not module.name.startswith("_"))


def check_dataset(cfg: DatasetConfig, data_dir: str | Path) -> None:
    """Look whether the data of `cfg` is there; cheap, and imports nothing heavy.

    Raises:
        UserError: If there is no such dataset, or it does not take an option of `cfg`.
        MissingInputError: If its data is not where it is expected, and is not to be downloaded.
    """
    _module(cfg).check(cfg, Path(data_dir).expanduser())


def load_dataset(cfg: DatasetConfig, data_dir: str | Path) -> ImageSet:
    """Load the index (or, where they are small, the images) of the dataset of `cfg`; download it first, if asked to.

    Args:
        cfg: The `dataset` node of the configuration.
        data_dir: Root folder of all datasets.

    Raises:
        UserError: If there is no such dataset, it does not take an option of `cfg`, its index or an image that it
            names is wrong, or it is not the official set and `cfg.verify` is on.
        MissingInputError: If its data is not where it is expected, and cannot be downloaded.
    """
    from recast_exp.data.protocol import choose

    return choose(cfg, read_official(cfg, data_dir))


def read_official(cfg: DatasetConfig, data_dir: str | Path) -> Official:
    """Read a set as it was published, before anything is chosen from it; see `load_dataset`."""
    module, data_dir = _module(cfg), Path(data_dir).expanduser()
    module.check(cfg, data_dir)
    if not hasattr(module, "layout"):
        official: Official = module.read(cfg, data_dir)
        return official
    layout: Layout = module.layout(cfg)
    if cfg.download:
        from recast_exp.data.download import download

        download(layout.archives, data_dir, name=cfg.name)
    root = layout.root(cfg, data_dir)
    layout.require(cfg, root)
    official = module.read(cfg, data_dir)
    if cfg.verify:
        layout.verify(cfg, official, root)
    return official


def _module(cfg: DatasetConfig) -> ModuleType:
    reader = cfg.reader or cfg.name
    if reader not in names():
        key = "dataset.reader" if cfg.reader else "dataset.name"
        raise UserError(f"{key}: got {reader!r}, takes one of {', '.join(names())}")
    return importlib.import_module(f"{sets.__name__}.{reader}")
