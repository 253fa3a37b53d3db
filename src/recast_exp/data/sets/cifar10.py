"""CIFAR-10: 32x32 photographs of 10 classes of objects, 50,000 training and 10,000 test images.

The layout is that of the official archive for Python, read by torchvision. The images are kept in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.data.layout import Layout
from recast_exp.data.sets._cifar import read_batches
from recast_exp.data.types import Official

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig

_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
LAYOUT = Layout(
    folder="cifar-10-batches-py",
    entries=tuple(_MD5),
    shape=f"{{{','.join(_MD5)}}}",
    source="https://www.cs.toronto.edu/~kriz/cifar.html",
    archives=(
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            provides="cifar-10-batches-py",
            md5="c58f30108f718f92721af3b95e74349a",
            member="cifar-10-batches-py",
        ),
    ),
    num_classes=10,
    md5s=_MD5,
    images={"train": 50000, "test": 10000},
)


def layout(cfg: DatasetConfig) -> Layout:
    """The published set."""
    return LAYOUT


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder and its batches are present; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the images; see `read_batches`."""
    from torchvision.datasets import CIFAR10

    return read_batches(CIFAR10, LAYOUT.root(cfg, data_dir), cfg)
