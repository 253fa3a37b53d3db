"""Any folder of class folders, with or without split folders above them.

    path/CLASS/**/*.jpg                    divided by class: 60 % train, 20 % validation, 20 % test
    path/{train,val,test}/CLASS/**/*.jpg   as it is; without val, it is taken from train

Classes are the class folders in natural order (2 before 10).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.base import SPLITS, ImageSet, Samples, carve_validation, refuse, split_by_class
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    from recast_exp.config import DatasetConfig

_FRACTIONS = (0.6, 0.2, 0.2)
_SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LAYOUT = "dataset=folder takes PATH/CLASS/*.jpg or PATH/{train,val,test}/CLASS/*.jpg"


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Look whether the folder is there and holds folders.

    Raises:
        UserError: If `cfg.path` is not set, `cfg.part` is, or some split folder is missing or there twice.
        MissingInputError: If there is no such folder, or no folder in it.
    """
    refuse(cfg, "part")
    if cfg.path is None:
        raise UserError(f"dataset.path: got nothing; {_LAYOUT}: set dataset.path=PATH")
    root = Path(cfg.path).expanduser()
    if not root.is_dir():
        raise MissingInputError(f"dataset.path: no folder {root}; {_LAYOUT}, with your own images")
    if not _folders(root):
        raise MissingInputError(f"dataset.path: no folders in {root}; {_LAYOUT}, with your own images")
    _split_folders(root)


def load(cfg: DatasetConfig, data_dir: Path) -> ImageSet:
    """List the images.

    Raises:
        UserError: If a class has no image, or too few to be divided, or the splits have different classes.
    """
    root = Path(cfg.path or "").expanduser()
    folders = _split_folders(root)
    if not folders:
        classes, samples = _scan(root)
        parts = split_by_class(samples.labels, _FRACTIONS, cfg.split_seed, classes)
        return ImageSet(cfg.name, classes, {s: samples.select(part) for s, part in zip(SPLITS, parts, strict=True)})

    scanned = {split: _scan(folder) for split, folder in folders.items()}
    classes = scanned["train"][0]
    for split, (others, _) in scanned.items():
        if different := sorted(set(classes) ^ set(others), key=_natural):
            raise UserError(f"{root}: train and {split} differ in the class folders {', '.join(different)}")
    splits = {split: samples for split, (_, samples) in scanned.items()}
    if "val" not in splits:
        splits["train"], splits["val"] = carve_validation(splits["train"], cfg.val_fraction, cfg.split_seed, classes)
    return ImageSet(cfg.name, classes, splits)


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
        raise UserError(
            f"{root}: has {', '.join(found)} but no {' and no '.join(missing)}; {_LAYOUT} (val is optional)"
        )
    return found


def _scan(root: Path) -> tuple[tuple[str, ...], Samples]:
    """List the classes below `root` and their images."""
    import numpy as np
    from PIL import Image

    extensions = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    paths: list[Path] = []
    labels: list[int] = []
    folders = _folders(root)
    for label, folder in enumerate(folders):
        files = [
            Path(below, name)
            for below, _, names in os.walk(folder)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in extensions
        ]
        if not files:
            raise UserError(f"{folder}: no image in this class folder; add images or remove it")
        paths += sorted(files, key=lambda path: _natural(str(path)))
        labels += [label] * len(files)
    return tuple(folder.name for folder in folders), Samples(tuple(paths), np.array(labels, dtype=np.int64))


def _folders(root: Path) -> list[Path]:
    """The folders in `root` in natural order, without hidden ones and what macOS leaves in archives."""
    found = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that takes digits as numbers; the name itself decides between 1 and 01."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
