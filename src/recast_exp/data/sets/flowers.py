"""Oxford Flowers-102: 102 species of flowers, 1020 training, 1020 validation and 6149 test images.

The layout is the official one, read by torchvision. The official class numbers run from 1 to 102.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.data.layout import Layout
from recast_exp.data.sets._mat import check_mat
from recast_exp.data.sets._torchvision import reading, samples
from recast_exp.data.types import SPLITS, Official

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_SPLIT, _LABELS = "setid.mat", "imagelabels.mat"
_MD5 = {_SPLIT: "a5357ecc9cb78c4bef273ce3793fc85c", _LABELS: "e0620be6f572b9609742df49c70aed4d"}
_SOURCE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
LAYOUT = Layout(
    folder="flowers-102",
    entries=(_SPLIT, _LABELS, "jpg/"),
    shape=f"{{{_SPLIT},{_LABELS}}} and jpg/image_*.jpg",
    source=_SOURCE,
    archives=(
        Archive(
            f"{_SOURCE}102flowers.tgz",
            provides="flowers-102/jpg",
            md5="52808999861908f626f3c1f4e79d11fa",
            member="jpg",
        ),
        *(Archive(_SOURCE + file, provides=f"flowers-102/{file}", md5=md5) for file, md5 in _MD5.items()),
    ),
    num_classes=102,
    md5s=_MD5,
    images={"train": 1020, "val": 1020, "test": 6149},
)


def layout(cfg: DatasetConfig) -> Layout:
    """The published set."""
    return LAYOUT


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder, its two lists and its images are present; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the lists.

    Raises:
        UserError: If a list is not the official one and `cfg.verify` is set, or cannot be read.
    """
    from torchvision.datasets import Flowers102

    class CutDown(Flowers102):  # type: ignore[misc]
        """Opens other lists than the official ones."""

        def _check_integrity(self) -> bool:
            return True

    root = LAYOUT.root(cfg, data_dir)
    dataset_class = Flowers102 if cfg.verify else CutDown
    for file in _MD5:
        check_mat(root / file, cfg.name)
    with reading(cfg, root):
        splits = {split: samples(dataset_class(root.parent, split, loader=Path)) for split in SPLITS}
    classes = tuple(Flowers102.classes)
    return Official(classes, splits, tuple(range(1, len(classes) + 1)), index=str(root / "*.mat"), root=root)
