"""CIFAR-100: 32x32 photographs of 100 classes of objects, 50,000 training and 10,000 test images.

The labels are the fine ones. The layout is that of the official archive for Python, read like CIFAR-10.
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

LAYOUT = Layout(
    folder="cifar-100-python",
    entries=("train", "test", "meta"),
    shape="{train,test,meta}",
    source="https://www.cs.toronto.edu/~kriz/cifar.html",
    archives=(
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            provides="cifar-100-python",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            member="cifar-100-python",
        ),
    ),
    num_classes=100,
    md5s={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
    images={"train": 50000, "test": 10000},
)


def layout(cfg: DatasetConfig) -> Layout:
    """The published set."""
    return LAYOUT


def check(cfg: DatasetConfig, data_dir: Path) -> None:
    """Check that the folder and its files are present; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the images; see `read_batches`."""
    from torchvision.datasets import CIFAR100

    return read_batches(CIFAR100, LAYOUT.root(cfg, data_dir), cfg)
