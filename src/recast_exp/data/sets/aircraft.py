"""FGVC-Aircraft 2013b: 10,000 images of aircraft, labelled with 100 variants, 70 families or 30 manufacturers.

The layout is that of the official archive, read by torchvision; `dataset.level` chooses the labels.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.data.layout import Layout
from recast_exp.data.sets._torchvision import reading, samples
from recast_exp.data.types import SPLITS, Official
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_LEVELS = {"variant": ("variants.txt", 100), "family": ("families.txt", 70), "manufacturer": ("manufacturers.txt", 30)}
"""The list of the class names, and how many there are."""


def layout(cfg: DatasetConfig) -> Layout:
    """The published set, with the labels of one level.

    Raises:
        UserError: If the level is unknown.
    """
    level = _level(cfg)
    classes, num_classes = _LEVELS[level]
    return Layout(
        folder="fgvc-aircraft-2013b",
        entries=(f"data/{classes}", *(f"data/{_list(level, split)}" for split in SPLITS), "data/images/"),
        shape=f"data/{{{classes},images_{level}_*.txt}} and data/images/*.jpg",
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        archives=(
            Archive(
                "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
                provides="fgvc-aircraft-2013b",
                member="fgvc-aircraft-2013b",
            ),
        ),
        num_classes=num_classes,
        lines={f"data/{classes}": num_classes, f"data/{_list(level, 'train')}": 3334},
        images={"train": 3334, "val": 3333, "test": 3333},
    )


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder, the lists of the level and the images are present; see `Layout.check`."""
    layout(cfg).check(cfg, data_dir, "level")


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the lists.

    Raises:
        UserError: If a line is malformed. Names file and line.
    """
    from torchvision.datasets import FGVCAircraft

    root, level = layout(cfg).root(cfg, data_dir), _level(cfg)
    for split in SPLITS:
        _check_list(root / "data" / _list(level, split), root / "data" / _LEVELS[level][0])
    with reading(cfg, root):
        opened = {split: FGVCAircraft(root.parent, split, level, loader=Path) for split in SPLITS}
        splits = {split: samples(dataset) for split, dataset in opened.items()}
    return Official(tuple(opened["train"].classes), splits, index=str(root / "data" / _list(level, "*")), root=root)


def _level(cfg: DatasetConfig) -> str:
    level = cfg.level or "variant"
    if level not in _LEVELS:
        raise UserError(f"dataset.level: expected one of {', '.join(_LEVELS)} for dataset={cfg.name}, got {level!r}")
    return level


def _list(level: str, split: str) -> str:
    return f"images_{level}_{split}.txt"


def _check_list(path: Path, classes: Path) -> None:
    """Report the line that torchvision would fail on without naming it."""
    for file in (path, classes):
        if file.read_bytes().startswith(codecs.BOM_UTF8):
            raise UserError(f"{file}: expected text without a byte order mark, got one; save the list without it")
    names = {line.strip() for line in classes.read_text(encoding="utf-8", errors="replace").splitlines()}
    for line, content in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        image, _, name = content.strip().partition(" ")
        if not image or name not in names:
            raise UserError(
                f"{path}, line {line}: expected an image, a space and one of the {len(names)} names in {classes.name}, "
                f"got {content[:80]!r}"
            )
