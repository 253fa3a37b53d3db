"""MATLAB files (.mat), looked at before SciPy reads them: it takes any memory that one asks for, and nests for ever."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from recast_exp.errors import UserError

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
"""Kinds of elements: an array, whose parts are elements, too, and a compressed element."""

_DEEPEST = 8
"""Arrays within arrays. The lists of Stanford Cars nest two; SciPy's reader crashes Python at some thousands."""

_MAX_RATIO, _FREE_BYTES = 20, 1 << 26
"""A file may unpack to 20 times its size, or to 64 MiB if that is more: images hardly shrink, and lists are small."""


def check_mat(path: Path, dataset: str) -> None:
    """Refuse a file that would take far more memory than it is long, or the whole process.

    Args:
        path: The file.
        dataset: The name of its dataset, for the message.

    Raises:
        UserError: One line.
    """
    try:
        content = path.read_bytes()
        if 0 in content[:4]:  # of version 4, which neither compresses nor nests
            return
        order = "<" if content[126:_HEADER] == b"IM" else ">"  # as SciPy has it
        room = max(_FREE_BYTES, _MAX_RATIO * len(content))
        for kind, inner in _elements(memoryview(content)[_HEADER:], order):
            if kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                unpacked = unpacker.decompress(inner, room + 1)
                room -= len(unpacked)
                if room < 0:
                    raise ValueError("it unpacks to far more than its size")
                for inner_kind, innermost in _elements(memoryview(unpacked), order):
                    _check_depth(inner_kind, innermost, order)
            else:
                _check_depth(kind, inner, order)
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise UserError(
            f"dataset {dataset}: expected a .mat file as in the official set, got {path}, which is another ({error}); "
            "get the whole set"
        ) from error


def _check_depth(kind: int, content: memoryview, order: str) -> None:
    within = [(1, content)] if kind == _MATRIX else []
    while within:
        depth, parts = within.pop()
        if depth > _DEEPEST:
            raise ValueError(f"its arrays are nested more than {_DEEPEST} deep")
        within += [(depth + 1, part) for inner, part in _elements(parts, order) if inner == _MATRIX]


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The kind and the content of each element, one after another."""
    at = 0
    while len(content) - at >= 8:
        kind, size = struct.unpack_from(f"{order}II", content, at)
        if kind >> 16:  # a short one: its size, kind and content in eight bytes
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
        else:
            start = at + 8
            at = start + size + (0 if kind == _COMPRESSED else -size % 8)
        yield kind, content[start : start + size]
