"""Caltech-UCSD Birds-200-2011: 200 species of birds, 5994 training and 5794 test images.

The layout is that of the official archive. A copy cut down to some of the classes has gaps in its class numbers: they
are mapped to 0, 1, 2, ... in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.data.layout import Layout
from recast_exp.data.types import Official, Samples
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_CLASSES, _IMAGES, _LABELS, _SPLIT = "classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"
LAYOUT = Layout(
    folder="CUB_200_2011",
    entries=(_CLASSES, _IMAGES, _LABELS, _SPLIT, "images/"),
    shape=f"{{{_IMAGES},{_LABELS},{_SPLIT},{_CLASSES}}} and images/CLASS/*.jpg",
    source="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    archives=(
        Archive(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            provides="CUB_200_2011",
            md5="97eceeb196236b17998738112f37df78",
            member="CUB_200_2011",
        ),
    ),
    num_classes=200,
    lines={_CLASSES: 200, _IMAGES: 11788},
    images={"train": 5994, "test": 5794},
    movable=True,
)


def layout(cfg: DatasetConfig) -> Layout:
    """The published set."""
    return LAYOUT


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder, its four lists and its images are present; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the lists.

    Raises:
        UserError: If a line is malformed, or the lists disagree. Names file and line.
    """
    import numpy as np

    root = LAYOUT.root(cfg, data_dir)
    numbered = sorted((number, name) for _, number, name in _read(root / _CLASSES))
    images = {number: name for _, number, name in _read(root / _IMAGES)}
    class_of = _choices(root / _LABELS, images, {str(number): label for label, (number, _) in enumerate(numbered)})
    trains = _choices(root / _SPLIT, images, {"1": 1, "0": 0})
    everything = Samples(
        tuple(root / "images" / name for name in images.values()),
        np.array([class_of[image] for image in images], dtype=np.int64),
    )
    is_train = np.array([trains[image] for image in images], dtype=bool)
    splits = {
        "train": everything.select(np.flatnonzero(is_train)),
        "test": everything.select(np.flatnonzero(~is_train)),
    }
    for image, name in images.items():
        folder, _, file = name.partition("/")
        if folder != numbered[class_of[image]][1] or not file or "/" in file or file == "..":
            raise UserError(
                f"{root / _IMAGES}: expected image {image} as CLASS/FILE of the class "
                f"{numbered[class_of[image]][1]!r}, which {_LABELS} gives it, got {name!r}"
            )
    numbers, names = tuple(number for number, _ in numbered), tuple(name for _, name in numbered)
    return Official(names, splits, numbers, index=str(root / _IMAGES), root=root)


def _read(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield the lines of a list: the number of the line, and the number (counted from 1) and the text on it."""
    seen = set()
    # Damaged bytes are replaced, so that the message below can name the line they are in
    for line, content in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not content.strip():
            continue
        number, _, text = content.strip().partition(" ")
        if not (number.isascii() and number.isdigit() and len(number) < 10 and text) or "\ufffd" in text:
            raise UserError(f"{path}, line {line}: expected a number, a space and a name, got {content[:80]!r}")
        if int(number) in seen:
            raise UserError(f"{path}, line {line}: expected each number once, got {number} a second time")
        seen.add(int(number))
        yield line, int(number), text


def _choices(path: Path, images: dict[int, str], meaning: dict[str, int]) -> dict[int, int]:
    """Read a list that gives one of the values in `meaning` to each image, and return their meanings."""
    choices = {}
    for line, number, value in _read(path):
        if number not in images:
            raise UserError(f"{path}, line {line}: expected an image of {path.parent / _IMAGES}, got number {number}")
        if value not in meaning:
            names = (", ".join(list(meaning)[:10]) or "no class at all") + (", …" if len(meaning) > 10 else "")
            raise UserError(f"{path}, line {line}: expected one of {names} for image {number}, got {value!r}")
        choices[number] = meaning[value]
    if unlisted := [number for number in images if number not in choices]:
        raise UserError(f"{path}: no line for image {unlisted[0]}, which {path.parent / _IMAGES} lists")
    return choices
