"""The form of a dataset: classes, and labelled images in three splits. Nothing heavy is imported."""

from __future__ import annotations

import copy
import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_exp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")


def _is_text(name: str) -> bool:
    """Whether a file can hold a name: half of a character is none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class Samples:
    """Images and their labels.

    Attributes:
        images: A uint8 array [N, H, W, 3], or the paths of N image files.
        labels: An int64 array [N] of class numbers, counted from 0.
    """

    images: NDArray[np.uint8] | tuple[Path, ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: NDArray[np.int64]) -> Samples:
        """Return the samples at `indices`, in that order."""
        images = self.images
        selected = tuple(images[i] for i in indices) if isinstance(images, tuple) else images[indices]
        return Samples(selected, self.labels[indices])

    def digest(self) -> str:
        """Hash of the labels and the image files (names and sizes) or pixels."""
        digest = hashlib.sha256(self.labels.tobytes())
        if isinstance(self.images, tuple):
            for path in self.images:
                name = f"{path.parent.name}/{path.name} {path.stat().st_size}\n"
                digest.update(name.encode("utf-8", "surrogateescape"))
        else:
            digest.update(self.images.tobytes())
        return digest.hexdigest()


def _problem(samples: Samples) -> str | None:
    """What was expected of images and labels, and what they are; those of another package may be anything."""
    images, labels = samples.images, samples.labels
    if isinstance(images, tuple):
        if odd := [image for image in images if not isinstance(image, Path)]:
            return f"a tuple of paths (pathlib.Path), got {odd[0]!r:.60} in it"
    elif str(getattr(images, "dtype", "")) != "uint8" or images.ndim != 4 or images.shape[3] != 3:
        return f"a uint8 array [N, H, W, 3] or a tuple of paths, got {_kind(images)}"
    if getattr(getattr(labels, "dtype", None), "kind", "") not in ("i", "u") or labels.shape != (len(images),):
        return f"an int64 array [{len(images)}] of labels, one for each, got {_kind(labels)}"
    return None


def _kind(values: object) -> str:
    """The type of values; dtype and shape of an array."""
    if hasattr(values, "dtype") and hasattr(values, "shape"):
        return f"{values.dtype} {list(values.shape)}"
    return f"a {type(values).__name__}"


@dataclass(frozen=True, eq=False)
class Official:
    """A set as it was published, before a task is chosen from it.

    Attributes:
        classes: Class names; a label is an index into them. In a cut-down copy, some may have no image.
        splits: The samples of "train", "test" and, if there is one, "val"; or of "all" for a set without splits.
        numbers: The class numbers in the set's own files; None if those are 0, 1, 2, ...
        index: The file or folder that lists the images, for messages.
        root: The folder of the set, which no listed name may leave; None where nothing is listed.
        unread: Of a folder, the number of files with each extension that is not read, and of skipped folders
            (`@eaDir/`).

    Raises:
        UserError: If images or labels are not of the kind of `Samples`, a label is not an index into the classes, a
            class or an image is listed twice, or an image is listed that would lie outside the folder.
    """

    classes: tuple[str, ...]
    splits: dict[str, Samples]
    numbers: tuple[int, ...] | None = None
    index: str = ""
    root: Path | None = None
    unread: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.index or "the index"
        if odd := [name for name in self.classes if not isinstance(name, str) or not name or not _is_text(name)]:
            raise UserError(f"{index}: expected names of classes, got {odd[0]!r:.60}")
        # One name may be written in several ways, and systems differ in theirs: a task trained elsewhere has to fit
        object.__setattr__(self, "classes", tuple(unicodedata.normalize("NFC", name) for name in self.classes))
        name, count = next(iter(Counter(self.classes).most_common(1)), ("", 0))
        if count > 1:
            raise UserError(f"{index}: expected each class once, got two with the name {name!r}")
        root = () if self.root is None else self.root.parts
        split_of: dict[Path, str] = {}
        for split, samples in self.splits.items():
            if wrong := _problem(samples):
                raise UserError(f"{index}: expected of the {split} images {wrong}")
            out_of_range = (samples.labels < 0) | (samples.labels >= len(self.classes))
            if out_of_range.any():
                number = int(out_of_range.argmax())
                image = samples.images[number] if isinstance(samples.images, tuple) else f"{split} image {number}"
                raise UserError(
                    f"{image}: expected a class number from 0 to {len(self.classes) - 1}, got "
                    f"{samples.labels[number]}; {index} is damaged"
                )
            for path in samples.images if isinstance(samples.images, tuple) else ():
                # As written: links that a user has made may lead anywhere
                parts = path.parts
                if root and (parts[: len(root)] != root or ".." in parts[len(root) :]):
                    raise UserError(f"{index}: expected names of images in {self.root}, got {path}, which lies outside")
                if path in split_of:
                    raise UserError(f"{path}: expected each image once, got it in {split_of[path]} and in {split}")
                split_of[path] = split


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A classification task: its classes and its three splits.

    Attributes:
        name: Name of the dataset.
        classes: Class names; a label is an index into them.
        splits: The samples of "train", "val" and "test".
        numbers: The class numbers in the set's own files; None if those are 0, 1, 2, ...
        skipped: Images that were left out, each with the reason.

    Raises:
        UserError: If a split is empty, a label is no index into the classes, or a class has no training image.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]
    numbers: tuple[int, ...] | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in SPLITS:
            if split not in self.splits:
                raise UserError(f"dataset {self.name}: expected the splits {', '.join(SPLITS)}, got no {split}")
            if not len(self.splits[split]):
                raise UserError(f"dataset {self.name}: the {split} split has no image")
            labels = self.splits[split].labels
            if (wrong := labels[(labels < 0) | (labels >= len(self.classes))]).size:
                raise UserError(
                    f"dataset {self.name}: expected labels from 0 to {len(self.classes) - 1}, got {wrong[0]} in {split}"
                )
        trained = set(self.splits["train"].labels.tolist())
        if untrained := [name for label, name in enumerate(self.classes) if label not in trained]:
            raise UserError(f"dataset {self.name}: no training image of class {', '.join(untrained)}")

    def relabelled(self, classes: tuple[str, ...]) -> ImageSet:
        """The same images with labels that are indices into other classes, which have all of these by name.

        Some of them may have no image then.
        """
        import numpy as np

        number_of = {name: number for number, name in enumerate(classes)}
        index = np.array([number_of[name] for name in self.classes], dtype=np.int64)
        splits = {name: Samples(samples.images, index[samples.labels]) for name, samples in self.splits.items()}
        return self._with(classes=classes, splits=splits, numbers=None)

    def with_test(self, indices: NDArray[np.int64]) -> ImageSet:
        """The same with some of the test images, in that order; there may be none."""
        return self._with(splits=self.splits | {"test": self.splits["test"].select(indices)})

    def _with(self, **changes: object) -> ImageSet:
        """A copy, without the check that each class has a training image."""
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    def describe(self) -> dict[str, Any]:
        """Describe the task, ready for JSON: name, class names in the order of the labels, images per split."""
        import numpy as np

        size = len(self.classes)
        counts = {split: np.bincount(self.splits[split].labels, minlength=size).tolist() for split in SPLITS}
        numbers = {} if self.numbers is None else {"official_numbers": list(self.numbers)}
        return {
            "name": self.name,
            "classes": list(self.classes),
            **numbers,
            "images": {split: len(self.splits[split]) for split in SPLITS},
            "images_per_class": counts,
            "skipped": dict(self.skipped),
        }
