"""Helpers of the datasets whose files torchvision reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from recast_exp.data.types import Samples
from recast_exp.errors import RecastError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recast_exp.config.schema import DatasetConfig

Dataset = TypeVar("Dataset")


class Indexed(Protocol):
    """A torchvision dataset that was made with `loader=Path`: paths of images, and their labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Path, int]: ...


@contextlib.contextmanager
def reading(cfg: DatasetConfig, folder: Path) -> Iterator[None]:
    """Report in one line any error that torchvision raises for missing or damaged files.

    Args:
        cfg: The `dataset` node of the configuration.
        folder: Where the files are.

    Raises:
        UserError: If the block raises anything but a `RecastError`.
    """
    try:
        yield
    except RecastError:
        raise
    except Exception as error:
        advice = ", or set dataset.verify=false if it is a cut-down copy" if cfg.verify else ""
        raise UserError(
            f"dataset {cfg.name}: torchvision cannot read the files in {folder} ({reason(error)}); get the whole "
            f"set{advice}"
        ) from error


def samples(dataset: Indexed) -> Samples:
    """List the paths and labels of a torchvision dataset that was made with `loader=Path`, so that none is decoded."""
    paths, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return Samples(paths, labels_of(labels, paths[0].parent))


def labels_of(found: Sequence[object], where: Path) -> NDArray[np.int64]:
    """Labels as torchvision gives them, as an array [N].

    Args:
        found: The labels.
        where: Their file or folder, for the message.

    Raises:
        UserError: If one is no integer.
    """
    import numpy as np

    for label in found:
        if not (type(label) is int or isinstance(label, np.integer)):
            raise UserError(f"{where}: expected labels that are integers, got {label!r}")
    return np.array(found, dtype=np.int64)


def unverified(dataset_class: type[Dataset]) -> type[Dataset]:
    """Derive a class of torchvision that does not compare checksums, if its attributes hold them."""
    attributes: dict[str, object] = {
        name: [[*entry[:-1], None] for entry in getattr(dataset_class, name)]
        for name in ("train_list", "test_list")
        if hasattr(dataset_class, name)
    }
    if (lists := getattr(dataset_class, "split_list", None)) is not None:
        attributes["split_list"] = {split: [*entry[:-1], None] for split, entry in lists.items()}
    if isinstance(resources := getattr(dataset_class, "_RESOURCES", None), dict):  # of FER2013
        attributes["_RESOURCES"] = {part: (name, None) for part, (name, _) in resources.items()}
    if (meta := getattr(dataset_class, "meta", None)) is not None:
        attributes["meta"] = {**meta, "md5": None}
    # Some classes derive the name of their folder from their own name
    return type(dataset_class.__name__, (dataset_class,), attributes) if attributes else dataset_class


def without_pickles(dataset_class: type[Dataset]) -> type[Dataset]:
    """Derive a class of torchvision that reads the published files alone, not the `.pt` that its old versions made.

    Those are pickles that anyone can have put there, and no checksum is known of them.
    """
    if not hasattr(dataset_class, "_check_legacy_exist"):  # MNIST and what is made like it
        return dataset_class
    return type(dataset_class.__name__, (dataset_class,), {"_check_legacy_exist": lambda _: False})


def reason(error: Exception) -> str:
    """The message of torchvision in one line, without its advice on an argument that users do not see."""
    text = " ".join(str(error).split()).partition(" You can use download")[0]
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__}: {text}"
