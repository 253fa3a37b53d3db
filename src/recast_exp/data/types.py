"""What a dataset is here: classes, and images with labels in three splits. Nothing heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_exp.data.download import Archive
from recast_exp.errors import MissingInputError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from recast_exp.config.schema import DatasetConfig

SPLITS = ("train", "val", "test")
_OWN_OPTIONS = ("path", "part", "level", "options")
"""Options that only some datasets take."""


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


@dataclass(frozen=True, eq=False)
class Official:
    """A set as it was published, before anything is chosen from it.

    Attributes:
        classes: Class names; a label is an index into them. Some may have no image in a cut-down copy.
        splits: The samples of "train", "test" and, where there is one, "val"; or of "all" where nobody divided them.
        numbers: What the set's own files call the classes; None where that is 0, 1, 2, ...
        index: The file or folder that lists the images, for messages.

    Raises:
        UserError: If a label is no index into the classes, or a class or an image is listed twice.
    """

    classes: tuple[str, ...]
    splits: dict[str, Samples]
    numbers: tuple[int, ...] | None = None
    index: str = ""

    def __post_init__(self) -> None:
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise UserError(
                f"{self.index or 'the index'}: two classes have the name {twice[0]!r}; takes each name once"
            )
        where: dict[Path, str] = {}
        for split, samples in self.splits.items():
            wrong = (samples.labels < 0) | (samples.labels >= len(self.classes))
            if wrong.any():
                number = int(wrong.argmax())
                image = samples.images[number] if isinstance(samples.images, tuple) else f"{split} image {number}"
                raise UserError(
                    f"{image}: has the class number {samples.labels[number]}, takes 0 to {len(self.classes) - 1}; "
                    f"{self.index or 'the index'} is damaged"
                )
            for path in samples.images if isinstance(samples.images, tuple) else ():
                if path in where:
                    raise UserError(f"{path}: listed in {where[path]} and again in {split}; takes each image once")
                where[path] = split


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A classification task: its classes and its three splits.

    Attributes:
        name: Name of the dataset.
        classes: Class names; a label is an index into them.
        splits: The samples of "train", "val" and "test".
        numbers: What the set's own files call the classes; None where that is 0, 1, 2, ...
        skipped: Images that were left out, each with the reason.

    Raises:
        UserError: If a split is empty, or a class has no training image.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Samples]
    numbers: tuple[int, ...] | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not len(self.splits[split]):
                raise UserError(f"dataset {self.name}: the {split} split has no image")
        trained = set(self.splits["train"].labels.tolist())
        without = [name for label, name in enumerate(self.classes) if label not in trained]
        if without:
            raise UserError(f"dataset {self.name}: no training image of class {', '.join(without)}")

    def describe(self) -> dict[str, Any]:
        """Return what is there, ready for JSON: name, class names in the order of the labels, images per split."""
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


@dataclass(frozen=True)
class Layout:
    """How a published set lies on disk, how large it is, and where it is from.

    Attributes:
        folder: Its folder below `data_dir`.
        entries: What must be in that folder; the name of a folder ends in "/".
        shape: The layout in words, for messages.
        source: The official page.
        archives: What `dataset.download=true` fetches.
        num_classes: Classes of the whole set.
        images: Images of the whole set, per official split.
        md5s: Checksums of files of the whole set.
        lines: How many lines lists of the whole set have, where their checksums are not published.
        movable: Whether the folder may have another name (torchvision's classes insist on theirs).
    """

    folder: str
    entries: tuple[str, ...]
    shape: str
    source: str
    archives: tuple[Archive, ...]
    num_classes: int
    images: dict[str, int]
    md5s: Mapping[str, str] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    movable: bool = False

    def root(self, cfg: DatasetConfig, data_dir: Path) -> Path:
        """The folder of the set.

        Raises:
            UserError: If `dataset.path` has a name that the set's reader does not take.
        """
        if cfg.path is None:
            return data_dir / self.folder
        root = Path(cfg.path).expanduser()
        if not self.movable and root.name != self.folder:
            raise UserError(
                f"dataset.path: got {root}, dataset={cfg.reader or cfg.name} takes a folder with the name {self.folder}"
            )
        return root

    def check(self, cfg: DatasetConfig, data_dir: Path, *takes: str) -> None:
        """Look whether the set is there, unless it may be downloaded.

        Args:
            cfg: The `dataset` node of the configuration.
            data_dir: Root folder of all datasets.
            takes: Options of its own that the set takes, besides `path`.

        Raises:
            UserError: If an option is set that means nothing to this set.
            MissingInputError: If it is not there.
        """
        refuse(cfg, *takes, "path")
        root = self.root(cfg, data_dir)
        if not cfg.download:
            self.require(cfg, root)
        elif cfg.path is not None:
            raise UserError(f"dataset.path: got {root} with dataset.download=true, which fills data_dir; leave one out")

    def require(self, cfg: DatasetConfig, root: Path) -> None:
        """Look whether all entries are there and, with `cfg.verify`, whether files are those of the whole set.

        Raises:
            MissingInputError: One line with what is missing, the layout, and where to get it.
            UserError: If a file is not the official one.
        """
        missing = [entry for entry in self.entries if not _exists(root, entry)]
        if missing:
            found = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"no folder {root}"
            path = " or dataset.path=…" if self.movable else ""
            raise MissingInputError(
                f"dataset {cfg.name}: {found}; set dataset.download=true, or get it from {self.source} so that "
                f"data_dir holds {self.folder}/{self.shape}, or say where it is with data_dir=…{path}"
            )
        for file, expected in self.md5s.items() if cfg.verify else ():
            with (root / file).open("rb") as opened:
                found = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if found != expected:
                raise UserError(
                    f"dataset {cfg.name}: {root / file} has md5 {found}, the official file {expected}; get it whole, "
                    "or set dataset.verify=false to open a cut-down or changed copy"
                )
        for file, count in self.lines.items() if cfg.verify else ():
            lines = sum(bool(line.strip()) for line in (root / file).read_bytes().splitlines())
            if lines != count:
                raise UserError(
                    f"dataset {cfg.name}: {root / file} has {lines:,} lines, the official file {count:,}; get it "
                    "whole, or set dataset.verify=false to open a cut-down copy"
                )

    def verify(self, cfg: DatasetConfig, official: Official, root: Path) -> None:
        """Compare the numbers of classes and images with those of the whole set.

        Raises:
            UserError: If they differ.
        """
        found = {split: len(samples) for split, samples in official.splits.items()}
        if found != self.images or len(official.classes) != self.num_classes:
            raise UserError(
                f"dataset {cfg.name}: {root} has {_counts(len(official.classes), found)}; the official set has "
                f"{_counts(self.num_classes, self.images)}; get it whole, or use it as it is with dataset.verify=false"
            )


def refuse(cfg: DatasetConfig, *takes: str) -> None:
    """Refuse the options that mean nothing to a dataset, rather than ignore them.

    Args:
        cfg: The `dataset` node of the configuration.
        takes: The options, among those that only some datasets take, that this one takes.

    Raises:
        UserError: If another of them is set.
    """
    for key in _OWN_OPTIONS:
        value = getattr(cfg, key)
        if value and key not in takes:
            raise UserError(
                f"dataset.{key}: got {value!r}, but dataset={cfg.reader or cfg.name} does not take it; leave it out"
            )


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
                f"class {classes[label]}: {len(members)} image(s) cannot be divided into {len(fractions)} splits; add "
                "images, or name the other classes in dataset.classes"
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


def carve_validation(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Set a stratified share of the training samples aside, where a dataset has no validation split.

    Args:
        samples: The training samples.
        fraction: Share to set aside, of each class, at least one sample; none of a class that has but one.
        seed: Chooses the samples.

    Returns:
        The remaining training samples, and the validation samples; these may be none.
    """
    import numpy as np

    counts = np.bincount(samples.labels)
    single = counts[samples.labels] == 1
    train, val = np.flatnonzero(single), np.flatnonzero(~single)
    if len(val):
        parts = split_by_class(samples.labels[~single], (1 - fraction, fraction), seed, [])
        train, val = np.sort(np.concatenate([train, val[parts[0]]])), val[parts[1]]
    return samples.select(train), samples.select(val)


def _exists(root: Path, entry: str) -> bool:
    return (root / entry).is_dir() if entry.endswith("/") else (root / entry).is_file()


def _counts(classes: int, images: dict[str, int]) -> str:
    parts = ", ".join(f"{count:,} {split}" for split, count in images.items())
    return f"{classes} classes and {parts} images"
