"""Images that are in a dataset more than once, byte for byte: a test image that was trained on measures nothing."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from recast_exp.data.types import Samples


@dataclass(frozen=True)
class Copy:
    """An image in a dataset: its split, its label, and its file or number."""

    split: str
    label: int
    name: str


def copies(splits: Mapping[str, Samples]) -> list[list[Copy]]:
    """The images that have the same bytes: those of the files, or the pixels where images are arrays.

    Files are read only where another has their size. A file that cannot be read is no copy.

    Args:
        splits: Split → its samples.

    Returns:
        Groups of two or more.
    """
    found: dict[Hashable, list[Copy]] = defaultdict(list)
    for image, key in _contents(splits):
        found[key].append(image)
    return [group for group in found.values() if len(group) > 1]


def _contents(splits: Mapping[str, Samples]) -> Iterator[tuple[Copy, Hashable]]:
    """Each image that may have a copy, and a hash of its content."""
    files: dict[int, list[tuple[Copy, Path]]] = defaultdict(list)
    for split, samples in splits.items():
        for number, label in enumerate(samples.labels.tolist()):
            if isinstance(samples.images, tuple):
                path = samples.images[number]
                files[_size(path)].append((Copy(split, label, str(path)), path))
            else:
                pixels = samples.images[number]
                digest = hashlib.sha256(f"{pixels.shape}".encode())
                digest.update(pixels.tobytes())
                yield Copy(split, label, f"{split} image {number}"), digest.digest()
    files.pop(-1, None)
    for alike in files.values():
        yield from _hashed(alike) if len(alike) > 1 else ()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _hashed(files: Iterable[tuple[Copy, Path]]) -> Iterator[tuple[Copy, Hashable]]:
    for image, path in files:
        try:
            with path.open("rb") as file:
                yield image, hashlib.file_digest(file, "sha256").digest()
        except OSError:
            continue
