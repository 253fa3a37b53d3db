"""Files of `torch.save`, looked at before torch reads them: it takes any time and any memory that a file asks for."""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO

import torch

_DEEPEST = 8
"""Tuples within tuples. Honest files nest three; the hash of a key of sixty would take for ever."""
_LEGACY_PICKLES = 5
"""With which a file of torch before 1.6 begins: magic number, protocol, system, content, keys of the storages."""


def load(path: Path) -> object:
    """Read a file of `torch.save` to the CPU, without unpickling code.

    Args:
        path: The file.

    Raises:
        ValueError: If it holds what `torch.save` does not write: compressed members, tuples in tuples without end, or
            bytes that do not have the checksum that was written for them, which torch does not look at.
        Exception: Whatever else torch, pickle and zipfile raise for damaged data.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start == b"PK\x03\x04":
            _check_zip(file, path.stat().st_size)
        elif start[:1] == b"\x80":
            for _ in range(_LEGACY_PICKLES):
                if file.peek(1):
                    _check_nesting(file)
        else:
            raise ValueError("it does not begin as a file of torch.save does")
    content: object = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _check_zip(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it holds compressed members, which torch.save does not write")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its members overlap")
        if not any(member.CRC for member in members):  # written with torch.serialization.set_crc32_options(False)
            for member in members:
                del member.CRC
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its member {damaged} is not as it was written")
        for member in members:
            if member.filename.endswith("/data.pkl"):
                _check_nesting(io.BytesIO(archive.read(member)))


def _check_nesting(file: IO[bytes]) -> None:
    """Go through a pickle without making anything, and refuse tuples that are nested deeper than an honest file's.

    For each object on the pickle's stack, the depth of the tuples in it; what cannot be a key of a dictionary counts 0.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken: list[int] = []
            before = opcode.stack_before
            if pickletools.markobject in before:
                place = marks.pop()
                taken = stack[place:]
                del stack[place:]
                before = before[: before.index(pickletools.markobject)]
            taken += [stack.pop() for _ in before]
            depth = 1 + max(taken, default=0) if name.startswith("TUPLE") else 0
            if depth > _DEEPEST:
                raise ValueError(f"it holds tuples in tuples, more than {_DEEPEST} deep")
            stack += [depth] * len(opcode.stack_after)
