"""Reading CIFAR-10 and CIFAR-100: pickles of arrays, in the official layout for Python."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from recast_exp.data.sets._torchvision import reading, unverified
from recast_exp.data.types import Official, Samples
from recast_exp.errors import RecastError, UserError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from recast_exp.config.schema import DatasetConfig

_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how Python 3 stores bytes for Python 2
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("dict", "list", "set", "tuple")),
}
"""All names that a pickle of arrays and plain containers refers to."""


class _Batches(Protocol):
    """What is used of torchvision's classes `CIFAR10` and `CIFAR100`."""

    train_list: ClassVar[list[list[str]]]
    test_list: ClassVar[list[list[str]]]
    meta: ClassVar[dict[str, str]]
    data: ArrayLike
    targets: list[int]
    classes: list[str]

    def __init__(self, root: Path, train: bool) -> None: ...


def read_batches(dataset_class: type[_Batches], root: Path, cfg: DatasetConfig) -> Official:
    """Read CIFAR-10 or CIFAR-100. The images are kept in memory.

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
            if odd := [name for name in classes if not isinstance(name, str)]:
                raise UserError(
                    f"{root}: expected names of classes, got {odd[0]!r} in {dataset_class.meta['filename']}"
                )
            if images.dtype != np.uint8 or len(images) != len(labels) or not np.isin(labels, range(len(classes))).all():
                raise UserError(
                    f"{root}: expected uint8 images and one label below {len(classes)} for each, got {len(images)} "
                    f"images of type {images.dtype} and {len(labels)} labels up to {labels.max(initial=0)} in the "
                    f"{split} batches"
                )
            splits[split] = Samples(images, labels)
    return Official(classes, splits, index=str(root))


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ARRAYS:
            raise UserError(f"{module}.{name}")
        found: object = super().find_class(module, name)
        return found


def _refuse_code(path: Path) -> None:
    """Refuse a pickle that holds anything but arrays: loading one from an unknown source can run any program.

    Raises:
        UserError: If it does, or is not a pickle.
    """
    try:
        with path.open("rb") as file:
            _ArraysOnly(file, encoding="latin1").load()
    except RecastError as error:
        raise UserError(
            f"{path}: expected a pickle of arrays, lists and dictionaries, as in the official set, got one that refers "
            f"to {error}; opening it could run a program"
        ) from None
    except Exception as error:  # pickle can raise nearly any exception on damaged data
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickle ({text}); replace it") from error
