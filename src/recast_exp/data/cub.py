"""Caltech-UCSD Birds-200-2011: 200 kinds of birds, 5994 training and 5794 test images.

The layout is the official archive's. A copy cut down to some of the classes works too: class numbers with gaps are
mapped to 0, 1, 2, ... in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.base import ImageSet, Samples, carve_validation, refuse
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    from recast_exp.config import DatasetConfig

_FOLDER = "CUB_200_2011"
_SOURCE = "https://www.vision.caltech.edu/datasets/cub_200_2011/"
_CLASSES, _IMAGES, _LABELS, _SPLIT = "classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Look for the folder, its four lists and its images.

    Raises:
        UserError: If `cfg.part` is set.
        MissingInputError: If one of them is missing.
    """
    refuse(cfg, "part")
    root = _root(cfg, data_dir)
    missing = [name for name in (_CLASSES, _IMAGES, _LABELS, _SPLIT) if not (root / name).is_file()]
    missing += [] if (root / "images").is_dir() else ["images/"]
    if missing:
        problem = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"no folder {root}"
        raise MissingInputError(
            f"dataset cub: {problem}; unpack CUB_200_2011.tgz from {_SOURCE} so that "
            f"data_dir holds {_FOLDER}/ (with {_IMAGES}, {_LABELS}, {_SPLIT}, {_CLASSES} and images/CLASS/*.jpg), or "
            "say where it is with data_dir=… or dataset.path=…"
        )


def load(cfg: DatasetConfig, data_dir: Path) -> ImageSet:
    """Read the lists: official training and test images, validation images taken from the training ones.

    Raises:
        UserError: If a line cannot be understood, the lists disagree, or an image is missing. Names file and line.
    """
    import numpy as np

    root = _root(cfg, data_dir)
    numbered = sorted((number, name) for _, number, name in _read(root / _CLASSES))
    classes = tuple(name for _, name in numbered)
    images = {number: name for _, number, name in _read(root / _IMAGES)}
    class_of = _choices(root / _LABELS, images, {str(number): label for label, (number, _) in enumerate(numbered)})
    trains = _choices(root / _SPLIT, images, {"1": 1, "0": 0})

    paths = [root / "images" / name for name in images.values()]
    found = {file for folder in {path.parent for path in paths} if folder.is_dir() for file in folder.iterdir()}
    for path in paths:
        if path not in found:
            raise UserError(f"{path}: missing, though {root / _IMAGES} lists it; unpack the archive again")

    everything = Samples(tuple(paths), np.array([class_of[image] for image in images], dtype=np.int64))
    is_train = np.array([trains[image] for image in images], dtype=bool)
    train, val = carve_validation(
        everything.select(np.flatnonzero(is_train)), cfg.val_fraction, cfg.split_seed, classes
    )
    test = everything.select(np.flatnonzero(~is_train))
    return ImageSet(cfg.name, classes, {"train": train, "val": val, "test": test})


def _root(cfg: DatasetConfig, data_dir: Path) -> Path:
    return Path(cfg.path).expanduser() if cfg.path is not None else data_dir / _FOLDER


def _read(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield the lines of a list: the line's own number, and the number from 1 and the text that it holds."""
    seen = set()
    # Damaged bytes are replaced, so that the message below can name the line they are in
    for line, content in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        number, _, text = content.strip().partition(" ")
        if not (number.isascii() and number.isdigit() and text) or "\ufffd" in text:
            raise UserError(f"{path}, line {line}: got {content[:80]!r}, expected a number, a space and a text")
        if int(number) in seen:
            raise UserError(f"{path}, line {line}: number {number} comes a second time")
        seen.add(int(number))
        yield line, int(number), text


def _choices(path: Path, images: dict[int, str], meaning: dict[str, int]) -> dict[int, int]:
    """Read a list that gives one of the values in `meaning` to each image, and return their meanings."""
    found = {}
    for line, number, value in _read(path):
        if number not in images:
            raise UserError(f"{path}, line {line}: image {number} is not in {path.parent / _IMAGES}")
        if value not in meaning:
            shown = ", ".join(list(meaning)[:10]) + (", …" if len(meaning) > 10 else "")
            raise UserError(f"{path}, line {line}: got {value!r} for image {number}, expected one of {shown}")
        found[number] = meaning[value]
    if without := [number for number in images if number not in found]:
        raise UserError(f"{path}: nothing about image {without[0]}, which {path.parent / _IMAGES} lists")
    return found
