"""Any folder of class folders, with or without split folders above them.

    path/CLASS/**/*.jpg                    divided by class: 60 % train, 20 % validation, 20 % test
    path/{train,val,test}/CLASS/**/*.jpg   as it is; without val, it is taken from train

Classes are the class folders in natural order (2 before 10).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.types import Official, Samples, refuse
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
"""Files with another extension are no images."""

_LAYOUT = "dataset=folder takes PATH/CLASS/*.jpg or PATH/{train,val,test}/CLASS/*.jpg"


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Look whether the folder is there and holds folders.

    Raises:
        UserError: If `cfg.path` is not set, or some split folder is there twice.
        MissingInputError: If there is no such folder, no folder in it, nothing in one of them, or a split is missing.
    """
    refuse(cfg, "path")
    if cfg.path is None:
        raise UserError(f"dataset.path: got nothing; {_LAYOUT}: set dataset.path=PATH")
    root = Path(cfg.path).expanduser()
    if not root.is_dir():
        raise MissingInputError(f"dataset.path: no folder {root}; {_LAYOUT}, with your own images")
    if not _folders(root):
        raise MissingInputError(f"dataset.path: no folders in {root}; {_LAYOUT}, with your own images")
    for split in list(_split_folders(root).values()) or [root]:
        for folder in _folders(split):
            if next(_files(folder), None) is None:
                raise _without_image(folder)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """List the images.

    Raises:
        MissingInputError: If a class has no image.
        UserError: If the splits have different classes.
    """
    root = Path(cfg.path or "").expanduser()
    folders = _split_folders(root)
    if not folders:
        classes, samples = _scan(root)
        return Official(classes, {"all": samples})
    scanned = {split: _scan(folder) for split, folder in folders.items()}
    classes = scanned["train"][0]
    for split, (others, _) in scanned.items():
        if different := sorted(set(classes) ^ set(others), key=_natural):
            raise UserError(f"{root}: train and {split} differ in the class folders {', '.join(different)}")
    return Official(classes, {split: samples for split, (_, samples) in scanned.items()})


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split, or nothing where `root` holds the class folders themselves.

    One such name among others is a class: trains are a class in more than one dataset.
    """
    folders = _folders(root)
    named = [folder for folder in folders if folder.name.lower() in _SPLIT_FOLDERS]
    if len(named) < min(2, len(folders)):
        return {}
    found: dict[str, Path] = {}
    for folder in named:
        split = _SPLIT_FOLDERS[folder.name.lower()]
        if split in found:
            raise UserError(f"{root}: {found[split].name} and {folder.name} are the same split; keep one of them")
        found[split] = folder
    if missing := [split for split in ("train", "test") if split not in found]:
        raise MissingInputError(
            f"{root}: has {', '.join(found)} but no {' and no '.join(missing)}; {_LAYOUT} (val is optional)"
        )
    return found


def _scan(root: Path) -> tuple[tuple[str, ...], Samples]:
    """List the classes below `root` and their images."""
    import numpy as np

    paths: list[Path] = []
    labels: list[int] = []
    folders = _folders(root)
    for label, folder in enumerate(folders):
        files = [path for path in _files(folder) if path.suffix.lower() in _EXTENSIONS]
        if not files:
            raise _without_image(folder)
        paths += sorted(files, key=lambda path: _natural(str(path)))
        labels += [label] * len(files)
    # A name that is not UTF-8 could not be written down
    names = tuple(os.fsencode(folder.name).decode("utf-8", "replace") for folder in folders)
    return names, Samples(tuple(paths), np.array(labels, dtype=np.int64))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden; linked folders count too, but none twice."""
    seen = set()
    for below, folders, names in os.walk(folder, followlinks=True):
        status = Path(below).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(below, name) for name in names if not name.startswith("."))


def _without_image(folder: Path) -> MissingInputError:
    return MissingInputError(f"{folder}: no image in this class folder; add images or remove it")


def _folders(root: Path) -> list[Path]:
    """The folders in `root` in natural order, without hidden ones and what macOS leaves in archives."""
    found = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that takes digits as numbers; the name itself decides between 1 and 01."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
