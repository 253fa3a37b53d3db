"""Datasets, found by their names among the modules of `recast_exp.data.sets` and the installed entry points.

Nothing heavy is imported here; a dataset's module imports nothing heavy either until it reads.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from recast_exp.config import converted
from recast_exp.errors import RecastError, UserError, section
from recast_exp.files import user_path
from recast_exp.plugins import DATASETS

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig
    from recast_exp.data.layout import Layout
    from recast_exp.data.types import ImageSet, Official


class DatasetModule(Protocol):
    """The functions of a dataset's module. A published set also has `layout(cfg)`, which returns its `Layout`."""

    def check(self, cfg: DatasetConfig, data_dir: Path) -> None:
        """Check options and look for files, without importing anything heavy.

        Raises:
            UserError: If an option is set that the dataset does not accept.
            MissingInputError: If its data is missing. One line: the expected files and folder, and where to get them.
        """
        ...

    def read(self, cfg: DatasetConfig, data_dir: Path) -> Official:
        """Read the index, or the images themselves if they are small, and return the set as it was published."""
        ...


def names() -> list[str]:
    """The names of all datasets, sorted."""
    return DATASETS.names()


def check_dataset(cfg: DatasetConfig, data_dir: str | Path) -> None:
    """Check that the data of `cfg` is present. This is cheap: nothing heavy is imported.

    Raises:
        UserError: If there is no such dataset, or it does not accept an option of `cfg`.
        MissingInputError: If its data is not where it is expected, and is not to be downloaded.
    """
    _module(cfg).check(cfg, user_path(data_dir))


def load_dataset(cfg: DatasetConfig, data_dir: str | Path) -> ImageSet:
    """Load the index of a dataset (or its images, if they are small); download it first, if `cfg.download` is set.

    Args:
        cfg: The `dataset` node of the configuration.
        data_dir: Root folder of all datasets.

    Raises:
        UserError: If there is no such dataset, it does not accept an option of `cfg`, its index is wrong, or it is not
            the official set and `cfg.verify` is set.
        MissingInputError: If its data or an image of its index is missing, and cannot be downloaded.
    """
    from recast_exp.data.protocol import choose

    return choose(cfg, read_official(cfg, data_dir))


def read_official(cfg: DatasetConfig, data_dir: str | Path) -> Official:
    """Read a set as it was published, before a task is chosen from it; see `load_dataset`."""
    module, data_dir = _module(cfg), user_path(data_dir)
    module.check(cfg, data_dir)
    if not hasattr(module, "layout"):
        return _official(cfg, module.read(cfg, data_dir))
    layout: Layout = module.layout(cfg)
    if cfg.download:
        from recast_exp.data.download import download

        download(layout.archives, data_dir, name=cfg.name)
    root = layout.root(cfg, data_dir)
    layout.require(cfg, root)
    official = _official(cfg, module.read(cfg, data_dir))
    if cfg.verify:
        layout.verify(cfg, official, root)
    return official


def _official(cfg: DatasetConfig, found: object) -> Official:
    """What a dataset's module has read, which may be of another package."""
    from recast_exp.data.types import Official

    if not isinstance(found, Official):
        raise UserError(f"dataset {cfg.name}: expected its function read to return an Official, got {found!r:.60}")
    return found


def is_published(cfg: DatasetConfig) -> bool:
    """Whether a dataset is one that somebody has published, and not images of one's own."""
    return not getattr(_module(cfg), "OWN", False)


def _module(cfg: DatasetConfig) -> DatasetModule:
    """The module that reads a dataset.

    Raises:
        UserError: If there is none, it cannot be imported, or it lacks a function. Names the key.
    """
    from recast_exp.config.schema import DatasetConfig

    if not isinstance(cfg, DatasetConfig):
        raise UserError(f"dataset: expected a DatasetConfig, got {type(cfg).__name__}")
    with section("dataset."):
        converted.check(cfg)
    key = "dataset.reader" if cfg.reader else "dataset.name"
    reader = cfg.reader or cfg.name
    try:
        module: ModuleType = DATASETS.load(reader)
    except RecastError as error:
        raise type(error)(f"{key}: {str(error).removeprefix('name: ')}") from error
    if absent := [function for function in ("check", "read") if not callable(getattr(module, function, None))]:
        raise UserError(
            f"{key}: expected the module {module.__name__} of dataset {reader} to have the functions check and read, "
            f"got none with the name {' or '.join(absent)}"
        )
    return cast(DatasetModule, module)
