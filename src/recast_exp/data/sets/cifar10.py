"""CIFAR-10: 32x32 photographs of 10 kinds of things, 50,000 for training and 10,000 for tests.

The layout is the official archive's for Python, read by torchvision. The images are kept in memory. CIFAR-100 is read
in the same way.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_exp.data.download import Archive
from recast_exp.data.sets.torchvision import reading, unverified
from recast_exp.data.types import Layout, Official, Samples
from recast_exp.errors import RecastError, UserError

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
    """Look for the folder and its batches; see `Layout.check`."""
    LAYOUT.check(cfg, data_dir)


def read(cfg: DatasetConfig, data_dir: Path) -> Official:
    """Read the images; see `read_batches`."""
    from torchvision.datasets import CIFAR10

    return read_batches(CIFAR10, LAYOUT.root(cfg, data_dir), cfg)


def read_batches(dataset_class: Any, root: Path, cfg: DatasetConfig) -> Official:
    """Read CIFAR-10 or CIFAR-100.

    Args:
        dataset_class: torchvision's class.
        root: The folder of the batches.
        cfg: The `dataset` node of the configuration.

    Raises:
        UserError: If a file holds anything but arrays, or cannot be read.
    """
    import numpy as np

    files = [name for name, _ in [*dataset_class.train_list, *dataset_class.test_list]]
    files.append(dataset_class.meta["filename"])
    if not cfg.verify:
        for file in files:
            _refuse_code(root / file)
        dataset_class = unverified(dataset_class)
    splits = {}
    with reading(cfg, root):
        for split, train in (("train", True), ("test", False)):
            dataset = dataset_class(root.parent, train=train)
            images, labels = np.ascontiguousarray(dataset.data), np.array(dataset.targets, dtype=np.int64)
            classes = tuple(dataset.classes)
            if images.dtype != np.uint8 or len(images) != len(labels) or not np.isin(labels, range(len(classes))).all():
                raise UserError(
                    f"{root}: the {split} batches have {len(images)} images of type {images.dtype} and {len(labels)} "
                    f"labels up to {labels.max(initial=0)}; expected uint8, and one label below {len(classes)} for each"
                )
            splits[split] = Samples(images, labels)
    return Official(classes, splits, index=str(root))


_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # Python 3 keeps bytes so for Python 2
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("dict", "list", "set", "tuple")),
}
"""What a pickle of arrays and plain containers refers to."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise UserError(f"refers to {module}.{name}")
        return super().find_class(module, name)


def _refuse_code(path: Path) -> None:
    """Refuse a pickle that holds anything but arrays: to load one from an unknown source can run any program.

    Raises:
        UserError: If it does, or is no pickle.
    """
    try:
        with path.open("rb") as file:
            _ArraysOnly(file, encoding="latin1").load()
    except RecastError as error:
        raise UserError(
            f"{path}: {error}, so that opening it could run a program; takes a pickle of arrays, lists and "
            "dictionaries, as in the official set"
        ) from None
    except Exception as error:  # pickle raises nearly anything on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickle ({reason}); replace it") from error
