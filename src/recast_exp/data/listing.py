"""The image files of a folder, a pattern, a list or a single path, one after another. Imports nothing heavy."""

from __future__ import annotations

import codecs
import fnmatch
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import user_path

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
"""Of image files; those of a folder with another extension are ignored."""

LISTS = (".txt", ".lst")
"""Of text files with a path in each line."""

_LONGEST_LINE = 1 << 16
"""Characters of a line of a list; a longer one is no path, and the file no list."""

_OF_SYSTEMS = "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"

_MAGIC = "*?["


def is_of_system(name: str) -> bool:
    """Whether a folder is one that systems leave, or hidden: they hold thumbnails, or what was thrown away."""
    return name.startswith((".", "__MACOSX")) or name in _OF_SYSTEMS


def images_at(where: str) -> Iterator[Path]:
    """Yield the paths of images in an order that does not change, a folder at a time: any number fits memory.

    Args:
        where: A folder, whose image files are found at any depth, but not in hidden folders or those that systems
            leave (`is_of_system`); a pattern (`photos/**/*.jpg`), in which `**` stands for any number of folders; a
            text file (.txt, .lst) with a path in each line; or an image file.

    Raises:
        MissingInputError: If there is nothing there, at the first step.
    """
    path = user_path(where)
    found: Iterator[Path]
    if path.is_dir():
        found = (each for each in _walk(path) if each.suffix.lower() in EXTENSIONS)
    elif path.is_file() and path.suffix.lower() in LISTS:
        found = _lines(path)
    elif path.is_file():
        found = iter([path])
    elif any(letter in where for letter in _MAGIC):
        *parts, name = path.parts
        start = next((at for at, part in enumerate(parts) if any(m in part for m in _MAGIC)), len(parts))
        asked = [*parts[start:], name]
        found = _matches(Path(*parts[:start]), asked)
        if asked.count("**") > 1:  # which may match a path in several ways
            seen: set[Path] = set()
            found = (each for each in found if each not in seen and not seen.add(each))  # type: ignore[func-returns-value]
    else:
        wrong = "is neither a file nor a folder" if path.exists() else "is not there"
        raise MissingInputError(
            f"stage.images: expected a folder, a pattern, a list (.txt) or an image, got {where}, which {wrong}"
        )
    first = next(found, None)
    if first is None:
        raise MissingInputError(f"stage.images: expected images, got {where}, which holds none")
    yield first
    yield from found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads round in a circle is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file, or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        log.warning("%s is left out: it cannot be read (%s)", folder, error.strerror)
        return []


def _walk(folder: Path) -> Iterator[Path]:
    entries = _entries(folder)
    yield from (Path(entry.path) for entry in entries if not is_folder(entry))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and not is_of_system(entry.name):
            yield from _walk(Path(entry.path))


def _matches(folder: Path, parts: list[str]) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _matches(folder, rest) if rest else _walk(folder)
        for entry in _entries(folder):
            if entry.is_dir(follow_symlinks=False) and not is_of_system(entry.name):
                yield from _matches(Path(entry.path), parts) if rest else ()
        return
    for entry in _entries(folder):
        if fnmatch.fnmatchcase(entry.name, part):
            if rest and is_folder(entry):
                yield from _matches(Path(entry.path), rest)
            elif not rest and not is_folder(entry):
                yield Path(entry.path)


def _lines(path: Path) -> Iterator[Path]:
    """The paths in a list; one that no file system could have is not there, as any other that is not."""
    try:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"stage.images: expected a list in UTF-8, got {path} in UTF-16; save it anew")
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(_LONGEST_LINE):
                if len(line) == _LONGEST_LINE:
                    raise UserError(
                        f"stage.images: expected a list with a path in each line, got {path}, which has a line of "
                        f"{_LONGEST_LINE:,} characters or more"
                    )
                if name := line.strip():
                    try:
                        yield user_path(name)
                    except UserError:
                        yield Path(name)
    except PermissionError as error:
        raise UserError(f"stage.images: {path} cannot be read ({error.strerror})") from error
