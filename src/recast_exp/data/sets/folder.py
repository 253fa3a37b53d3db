"""Any folder of class folders, with or without split folders above them.

    path/CLASS/**/*.jpg                    divided by class: 60 % train, 20 % validation, 20 % test
    path/{train,val,test}/CLASS/**/*.jpg   as divided; without val, a share of train is set aside

Classes are the class folders in natural order (2 before 10).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from recast_exp.data.layout import refuse
from recast_exp.data.listing import EXTENSIONS, is_of_system
from recast_exp.data.types import Official, Samples
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import user_path

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

log = logging.getLogger(__name__)

_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

OWN = True
"""There is no official set to compare with."""

_LAYOUT = "PATH/CLASS/*.jpg or PATH/{train,val,test}/CLASS/*.jpg"


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder is present and holds folders.

    Raises:
        UserError: If `cfg.path` is not set, or two folders are the same split.
        MissingInputError: If the folder, all class folders, all files of one of them, or a split is missing, or one of
            these cannot be opened.
    """
    refuse(cfg, "path")
    if cfg.path is None:
        raise UserError(f"dataset.path: expected the folder of {_LAYOUT}, got nothing; set dataset.path=PATH")
    root = user_path(cfg.path)
    if not root.is_dir():
        raise MissingInputError(f"dataset.path: expected the folder of {_LAYOUT}, got {root}, which is not a folder")
    if not _folders(root):
        raise MissingInputError(f"dataset.path: expected {_LAYOUT}, got {root}, which holds no folders")
    for split in list(_split_folders(root, cfg.test_from).values()) or [root]:
        for folder in _folders(split):
            if next(_files(folder), None) is None:
                raise _without_image(folder)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """List the images.

    Raises:
        MissingInputError: If a class has no image.
        UserError: If validation or test images have a class without training images.
    """
    import numpy as np

    root = user_path(cfg.path or "")
    folders = _split_folders(root, cfg.test_from)
    unread: Counter[str] = Counter()
    if not folders:
        classes, samples = _scan(root, unread)
        return Official(classes, {"all": samples}, unread=_reported(root, unread))
    unread.update(f"{folder.name}/" for folder in _folders(root) if folder not in folders.values())
    scanned = {split: _scan(folder, unread) for split, folder in folders.items()}
    classes = scanned["train"][0]
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, (names, samples) in scanned.items():
        if unknown := [name for name in names if name not in label_of]:
            raise UserError(f"{root}: expected the class folders of train in {split}, got {', '.join(unknown)} too")
        labels = np.array([label_of[name] for name in names], dtype=np.int64)
        splits[split] = Samples(samples.images, labels[samples.labels])
    return Official(classes, splits, unread=_reported(root, unread))


def _reported(root: Path, unread: Counter[str]) -> dict[str, int]:
    """What is not read, the most first; folders of systems are named, as they may hold copies of images."""
    found = dict(unread.most_common())
    if folders := [name for name in found if name.endswith("/")]:
        number = sum(found[name] for name in folders)
        log.info("%s: %d folder(s) that systems leave are skipped: %s", root, number, ", ".join(folders))
    return found


def _split_folders(root: Path, test_from: str) -> dict[str, Path]:
    """Return the folder of each split, or nothing if `root` holds the class folders themselves.

    A single such name among others is a class: several datasets have a class of trains.
    """
    folders = _folders(root)
    named = [folder for folder in folders if folder.name.lower() in _SPLIT_FOLDERS]
    if len(named) < min(2, len(folders)):
        return {}
    by_split: dict[str, Path] = {}
    for folder in named:
        split = _SPLIT_FOLDERS[folder.name.lower()]
        if split in by_split:
            raise UserError(f"{root}: {by_split[split].name} and {folder.name} are the same split; keep one of them")
        by_split[split] = folder
    if missing := [split for split in ("train", test_from) if split not in by_split]:
        hint = "; set dataset.test_from=val to test with the validation images" if missing == ["test"] else ""
        raise MissingInputError(
            f"{root}: expected {_LAYOUT}, got {', '.join(by_split)} but no {' and no '.join(missing)}{hint}"
        )
    return by_split


def _scan(root: Path, unread: Counter[str]) -> tuple[tuple[str, ...], Samples]:
    """List the classes below `root` and their images, and count in `unread` what is none."""
    import numpy as np

    paths: list[Path] = []
    labels: list[int] = []
    folders = _folders(root)
    for label, folder in enumerate(folders):
        found = list(_files(folder, unread))
        files = [path for path in found if path.suffix.lower() in EXTENSIONS]
        unread.update(path.suffix.lower() or "no extension" for path in found if path.suffix.lower() not in EXTENSIONS)
        if not files:
            raise _without_image(folder)
        paths += sorted(files, key=lambda path: _natural(str(path)))
        labels += [label] * len(files)
    # A name that is not UTF-8 could not be written to JSON
    names = tuple(os.fsencode(folder.name).decode("utf-8", "replace") for folder in folders)
    return names, Samples(tuple(paths), np.array(labels, dtype=np.int64))


def _files(folder: Path, unread: Counter[str] | None = None) -> Iterator[Path]:
    """All files below a folder that are not hidden; linked folders are followed, but none twice."""
    seen = set()
    for below, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        status = Path(below).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in [name for name in folders if is_of_system(name)]:
            folders.remove(name)
            if unread is not None and not name.startswith("."):
                unread[f"{name}/"] += 1
        yield from (Path(below, name) for name in names if not name.startswith("."))


def _fail(error: OSError) -> NoReturn:
    """A folder that is left out would be images that are left out."""
    raise MissingInputError(
        f"dataset.path: {error.filename} cannot be opened ({error.strerror}); make it readable, or move it elsewhere"
    ) from error


def _without_image(folder: Path) -> MissingInputError:
    return MissingInputError(f"{folder}: no image in this class folder; add images or remove it")


def _folders(root: Path) -> list[Path]:
    """The folders in `root` in natural order, without those that systems leave."""
    try:
        folders = [path for path in root.iterdir() if path.is_dir() and not is_of_system(path.name)]
    except OSError as error:
        _fail(error)
    return sorted(folders, key=lambda path: _natural(path.name))


def _natural(name: str) -> tuple[list[str | int], str]:
    """Sort key that compares digits as numbers; the name itself decides between 1 and 01."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
