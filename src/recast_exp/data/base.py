"""What a dataset is here: classes, and images with labels in three splits. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_exp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recast_exp.config import DatasetConfig

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Samples:
    """Images and their labels.

    Attributes:
        images: A uint8 array [N, H, W, 3], or the paths of N image files.
        labels: An int64 array [N] of class numbers from 0.
    """

    images: NDArray[np.uint8] | tuple[Path, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order."""
        images = self.images
        chosen = tuple(images[i] for i in indices) if isinstance(images, tuple) else images[indices]
        return Samples(chosen, self.labels[indices])


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A classification task: its classes and its three splits.

    Attributes:
        name: Name of the dataset.
        classes: Class names; a label is an index into them.
        splits: The samples of "train", "val" and "test".

    Raises:
        UserError: If a split is empty, or a class has no training image.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not len(self.splits[split]):
                raise UserError(f"dataset {self.name}: the {split} split has no image")
        trained = set(self.splits["train"].labels.tolist())
        without = [name for label, name in enumerate(self.classes) if label not in trained]
        if without:
            raise UserError(f"dataset {self.name}: no training image of class {', '.join(without)}")

    def describe(self) -> dict[str, Any]:
        """Return the name, the class names in the order of the labels, and the images per split, ready for JSON."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "images": {split: len(self.splits[split]) for split in SPLITS},
        }


def split_by_class(
    labels: NDArray[np.int64], fractions: Sequence[float], seed: int, classes: Sequence[str]
) -> list[NDArray[np.int64]]:
    """Divide samples into parts that all hold each class in the same proportion.

    Every part gets at least one sample of every class; otherwise a class is divided as `fractions` say, rounded.
    scikit-learn's stratified split has no such floor: it leaves small classes out of small parts.

    Args:
        labels: Class numbers [N].
        fractions: Share of each part; they sum to 1.
        seed: Chooses the samples. The same seed gives the same parts everywhere.
        classes: Class names, for the message.

    Returns:
        For each part, its sample numbers, ascending.

    Raises:
        UserError: If a class has fewer samples than there are parts.
    """
    import numpy as np

    random = np.random.RandomState(seed)  # its stream is frozen, so a split never changes with numpy
    parts: list[list[NDArray[np.int64]]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < len(fractions):
            raise UserError(
                f"class {classes[label]}: {len(members)} image(s) cannot be divided into {len(fractions)} splits"
            )
        bounds = np.round(np.cumsum([0.0, *fractions]) * len(members)).astype(int)
        sizes = np.diff(bounds)
        while sizes.min() == 0:
            sizes[sizes.argmax()] -= 1
            sizes[sizes.argmin()] += 1
        shuffled = random.permutation(members)
        for part, chosen in zip(parts, np.split(shuffled, np.cumsum(sizes)[:-1]), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def carve_validation(samples: Samples, fraction: float, seed: int, classes: Sequence[str]) -> tuple[Samples, Samples]:
    """Set a stratified share of the training samples aside, where a dataset has no validation split.

    Args:
        samples: The training samples.
        fraction: Share to set aside, of each class, at least one sample.
        seed: Chooses the samples.
        classes: Class names, for the message.

    Returns:
        The remaining training samples, and the validation samples.

    Raises:
        UserError: If a class has fewer than two samples.
    """
    train, val = split_by_class(samples.labels, (1 - fraction, fraction), seed, classes)
    return samples.select(train), samples.select(val)


def refuse(cfg: DatasetConfig, *keys: str) -> None:
    """Refuse options that mean nothing to a dataset, rather than ignore them.

    Raises:
        UserError: If one of `keys` is set.
    """
    for key in keys:
        value = getattr(cfg, key)
        if value is not None:
            raise UserError(f"dataset.{key}: got {value!r}, but dataset={cfg.name} does not take it; leave it out")
