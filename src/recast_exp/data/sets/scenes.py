"""MIT Indoor-67: 67 classes of indoor scenes, 5360 training and 1340 test images.

The two official lists choose 100 images of each class among the 15,620 of the archive.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.data.layout import Layout
from recast_exp.data.types import Official, Samples
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}
LAYOUT = Layout(
    folder="indoor67",
    entries=(*_LISTS.values(), "Images/"),
    shape=f"{{{','.join(_LISTS.values())}}} and Images/CLASS/*.jpg",
    source="http://web.mit.edu/torralba/www/indoor.html",
    archives=(
        Archive(
            "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
            provides="indoor67/Images",
            member="Images",
        ),
        *(Archive(f"http://web.mit.edu/torralba/www/{file}", f"indoor67/{file}") for file in _LISTS.values()),
    ),
    num_classes=67,
    lines={_LISTS["train"]: 5360, _LISTS["test"]: 1340},
    images={"train": 5360, "test": 1340},
    movable=True,
)


def layout(cfg: DatasetConfig) -> Layout:
    """The published set."""
    return LAYOUT


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder, its two lists and its images are present; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the lists. Classes are in the order of their names.

    Raises:
        UserError: If a line is malformed, an image is listed twice, or a class is in one list only.
    """
    import numpy as np

    root = LAYOUT.root(cfg, data_dir)
    seen: dict[str, str] = {}
    listed = {split: _read(root / file, seen) for split, file in _LISTS.items()}
    present = {split: {name for name, _ in images} for split, images in listed.items()}
    for one, other in (("train", "test"), ("test", "train")):
        if unlisted := sorted(present[other] - present[one]):
            raise UserError(f"{root / _LISTS[one]}: no image of {', '.join(unlisted)}, which {_LISTS[other]} lists")
    classes = tuple(sorted(present["train"]))
    label_of = {name: label for label, name in enumerate(classes)}
    splits = {
        split: Samples(
            tuple(root / "Images" / name / file for name, file in images),
            np.array([label_of[name] for name, _ in images], dtype=np.int64),
        )
        for split, images in listed.items()
    }
    return Official(classes, splits, index=str(root / "*Images.txt"), root=root)


def _read(path: Path, seen: dict[str, str]) -> list[tuple[str, str]]:
    """Read the classes and file names of a list, and record in `seen` where each image is listed."""
    images = []
    # Damaged bytes are replaced, so that the message below can name the line they are in
    for line, content in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not content.strip():
            continue
        name, _, file = content.partition("/")
        if not name or not file or "/" in file or ".." in (name, file) or "\ufffd" in content:
            raise UserError(f"{path}, line {line}: expected CLASS/FILE, got {content[:80]!r}")
        if content in seen:
            raise UserError(
                f"{path}, line {line}: expected each image once, got {content} a second time, after {seen[content]}"
            )
        seen[content] = f"{path.name}, line {line}"
        images.append((name, file))
    return images
