"""The layout of a published set on disk: its folder, the checks of its completeness, and its source.

Nothing heavy is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recast_exp.data.download import Archive
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import user_path

if TYPE_CHECKING:
    from recast_exp.config.schema import DatasetConfig
    from recast_exp.data.types import Official

_SPECIAL_OPTIONS = ("path", "part", "level", "options")
"""Options that only some datasets accept."""


@dataclass(frozen=True)
class Layout:
    """The layout of a published set on disk, its size, and its source.

    Attributes:
        folder: Its folder below `data_dir`.
        entries: The files and folders that must be in that folder; the name of a folder ends in "/".
        shape: The layout in words, for messages.
        source: The official page.
        archives: The downloads of `dataset.download=true`.
        num_classes: Classes of the whole set.
        images: Images of the whole set, per official split.
        md5s: Checksums of files of the whole set.
        lines: Line counts of the lists of the whole set whose checksums are not published.
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
            UserError: If `dataset.path` has a name that the set's reader does not accept.
        """
        if cfg.path is None:
            return data_dir / self.folder
        root = user_path(cfg.path)
        if not self.movable and root.name != self.folder:
            raise UserError(
                f"dataset.path: expected a folder with the name {self.folder} for dataset={cfg.reader or cfg.name}, "
                f"got {root}"
            )
        return root

    def check(self, cfg: DatasetConfig, data_dir: Path, *options: str) -> None:
        """Check that the set is present, unless it may be downloaded.

        Args:
            cfg: The `dataset` node of the configuration.
            data_dir: Root folder of all datasets.
            options: The special options that the set accepts in addition to `path`; see `refuse`.

        Raises:
            UserError: If an option is set that the set does not accept.
            MissingInputError: If the set is missing.
        """
        refuse(cfg, *options, "path")
        root = self.root(cfg, data_dir)
        if not cfg.download:
            self.require(cfg, root)
        elif cfg.path is not None:
            raise UserError(
                f"dataset.path: expected null with dataset.download=true, which fills data_dir, got {root}; leave one "
                "of them out"
            )

    def require(self, cfg: DatasetConfig, root: Path) -> None:
        """Check that all entries are present and, with `cfg.verify`, that the files are those of the whole set.

        Raises:
            MissingInputError: If an entry is missing. One line that names it, the layout, and where to get the set.
            UserError: If a file is not the official one.
        """
        if missing := [entry for entry in self.entries if not _exists(root, entry)]:
            problem = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"no folder {root}"
            path = " or dataset.path=…" if self.movable else ""
            raise MissingInputError(
                f"dataset {cfg.name}: {problem}; set dataset.download=true, or get it from {self.source} so that "
                f"data_dir holds {self.folder}/{self.shape}, or set its location with data_dir=…{path}"
            )
        if not cfg.verify:
            return
        for name, expected in self.md5s.items():
            with (root / name).open("rb") as file:
                md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if md5 != expected:
                raise UserError(
                    f"dataset {cfg.name}: expected {root / name} to have the official md5 {expected}, got {md5}; get "
                    "the whole file, or set dataset.verify=false to use a cut-down or changed copy"
                )
        for name, count in self.lines.items():
            lines = sum(bool(line.strip()) for line in (root / name).read_bytes().splitlines())
            if lines != count:
                raise UserError(
                    f"dataset {cfg.name}: expected {root / name} to have {count:,} lines like the official file, got "
                    f"{lines:,}; get the whole file, or set dataset.verify=false to use a cut-down copy"
                )

    def verify(self, cfg: DatasetConfig, official: Official, root: Path) -> None:
        """Compare the numbers of classes and images with those of the whole set.

        Raises:
            UserError: If they differ.
        """
        images = {split: len(samples) for split, samples in official.splits.items()}
        if images != self.images or len(official.classes) != self.num_classes:
            raise UserError(
                f"dataset {cfg.name}: expected {_counts(self.num_classes, self.images)} as in the official set, got "
                f"{_counts(len(official.classes), images)} in {root}; get the whole set, or use this copy with "
                "dataset.verify=false"
            )


def refuse(cfg: DatasetConfig, *options: str) -> None:
    """Refuse options that a dataset does not accept, instead of ignoring them.

    Args:
        cfg: The `dataset` node of the configuration.
        options: Those of `path`, `part`, `level` and `options` that this dataset accepts.

    Raises:
        UserError: If another of them is set.
    """
    for key in _SPECIAL_OPTIONS:
        value = getattr(cfg, key)
        if value and key not in options:
            raise UserError(
                f"dataset.{key}: expected nothing for dataset={cfg.reader or cfg.name}, got {value!r}; leave it out"
            )


def _exists(root: Path, entry: str) -> bool:
    return (root / entry).is_dir() if entry.endswith("/") else (root / entry).is_file()


def _counts(num_classes: int, images: dict[str, int]) -> str:
    per_split = ", ".join(f"{count:,} {split}" for split, count in images.items())
    return f"{num_classes} classes and {per_split} images"
