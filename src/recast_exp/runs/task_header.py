"""The record in the header of a task file: it says what the file belongs to. Only the standard library is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from recast_exp.errors import MissingInputError, UserError

RECORD_KEY = "recast_exp"
"""Where the metadata of a task file holds our record."""

FORMAT = 1
"""The newest format of the record that this version reads."""

FROZEN = "frozen:"
"""Begins the fingerprint in a task file of `save_task`: of all that the task has not trained, templates included.

The fingerprint in a file of the command line is that of the pretrained weights, which are gone after injection.
"""


class Pretrained(TypedDict):
    """The weights that a task was trained on."""

    name: str
    fingerprint: str


class TaskRecord(TypedDict):
    """The record of a task file; what comes after `config` may lack in a file that this package has not written."""

    format: int
    version: str
    config: dict[str, Any]
    bank: str | None
    backbone: Pretrained
    classes: list[str]
    test_images: NotRequired[str]
    input: dict[str, object]
    eval_batch_size: int


_Header = TypedDict("_Header", {"__metadata__": NotRequired[dict[str, str]]})
"""The part of a header that is ours; next to it are the tensors."""

_HASH = re.compile(r"[0-9a-f]{64}")


def read_record(path: str | Path) -> TaskRecord:
    """Read the record of a task file from the header of its safetensors, with nothing but the standard library.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If the file is not a task file, is cut short, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"task: expected the task.safetensors of a run, got {path}, which does not exist")
    header = _header(path)
    try:
        record: TaskRecord = json.loads(header.get("__metadata__", {})[RECORD_KEY])
        version = int(record["format"])
        known = version > FORMAT or isinstance(record["config"], dict)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, a safetensors file that holds no task"
        )
    if version > FORMAT:
        raise UserError(
            f"task: {path} has format {version}, this version reads up to {FORMAT}; update recast_exp to read it"
        )
    if _has_interpolation(record["config"]):
        raise UserError(f"task: {path} holds an interpolation (${{…}}); expected plain values, so it is not used")
    bank = record.get("bank")
    if bank is not None and not (isinstance(bank, str) and _HASH.fullmatch(bank)):
        raise UserError(f"task: {path} names the bank {str(bank)[:80]!r}; expected 64 hexadecimal digits")
    return record


def _has_interpolation(value: object) -> bool:
    """Whether a text anywhere in a value would be resolved: to an environment variable, say."""
    if isinstance(value, Mapping):
        return any(map(_has_interpolation, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return any(map(_has_interpolation, value))
    return isinstance(value, str) and "${" in value


def _header(path: Path) -> _Header:
    """The header of a safetensors file: eight bytes of length, then JSON, then the tensors it announces."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= size else b""
    try:
        header = json.loads(text)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, which is no safetensors file or is cut short"
        ) from None
    if size < 8 + length + end:
        raise UserError(f"task: {path} is cut short: {size} bytes, where its header announces {8 + length + end}")
    found: _Header = header
    return found
