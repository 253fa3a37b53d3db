"""The record in the header of a task file: it says what the file belongs to. Only the standard library is needed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from recast_exp.errors import MissingInputError, UserError
from recast_exp.runs import hub

RECORD_KEY = "recast_exp"
"""Where the metadata of a task file holds our record."""

FORMAT = 2
"""The newest format of the record that this version reads, and the one that it writes.

1: a tensor of coefficients for each layer, which mean nothing without their bank; all keys of the configuration.
2: one vector of coefficients and its relative form, how to make the templates again, what an adapter keeps fixed; only
   the keys that differ from their defaults.
"""

FROZEN = "frozen:"
"""Begins the fingerprint in a file of `save_task` of format 1: of all that has not trained, templates included.

The fingerprint in a file of the command line is that of the pretrained weights, which are gone after injection.
"""

UNGROUPED = "ungrouped:"
"""Begins the same of format 2: of the weights without templates; `Templates.weights` is that of the others."""


class Pretrained(TypedDict):
    """The weights that a task was trained on."""

    name: str
    fingerprint: str


class Templates(TypedDict):
    """Which layers share templates, and how those were made (`recast.bank.Origin`).

    Attributes:
        groups: For each group its name, the numbers of templates and of blocks, and its layers.
        solver: None for banks whose origin is not known; the entries after it are missing then.
    """

    groups: list[list[Any]]
    solver: str | None
    seed: NotRequired[int]
    num_sets: NotRequired[int]
    options: NotRequired[dict[str, Any]]
    weights: NotRequired[str]


class TaskRecord(TypedDict):
    """The record of a task file."""

    format: int
    version: str
    config: dict[str, Any]
    bank: str | None
    templates: NotRequired[Templates]
    backbone: Pretrained
    classes: list[str]
    test_images: NotRequired[str]
    input: dict[str, Any]
    eval_batch_size: int
    metrics: NotRequired[dict[str, float]]
    checksum: NotRequired[str]


_Header = TypedDict("_Header", {"__metadata__": NotRequired[dict[str, str]]})
"""The part of a header that is ours; next to it are the tensors."""

_LARGEST = 100_000_000  # bytes of a header, as safetensors has it
_HASH = re.compile(r"[0-9a-f]{64}")


def task_files(text: str) -> list[Path]:
    """The task files that `task=` names: one, or several in brackets (`[birds.safetensors,hf://owner/pets]`).

    Raises:
        UserError: If an address of the Hub is none.
        MissingInputError: If the Hub has no such file.
    """
    if text.startswith("[") and text.endswith("]") and not Path(text).expanduser().is_file():
        return [hub.local(name.strip().strip("'\"")) for name in text[1:-1].split(",") if name.strip()]
    return [hub.local(text)] if text else []


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
        record: TaskRecord = json.loads(header.get("__metadata__", {})[RECORD_KEY], parse_constant=_refuse)
        version = record["format"]
        known = isinstance(version, int) and not isinstance(version, bool) and version >= 1
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        known = False
    if not known:
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, a safetensors file that holds no task"
        )
    if version > FORMAT:
        raise UserError(
            f"task: {path} has format {version}, this version reads up to {FORMAT}; update recast_exp to read it"
        )
    if unknown := [str(key) for key in record if key not in TaskRecord.__annotations__]:
        raise UserError(f"task: {path} has the entry {unknown[0][:80]!r}, which this version does not know")
    for key, expected, holds in _schema(record):
        if not holds:
            raise UserError(f"task: expected {expected} as {key} of {path}, got {_shown(record, key)}")
    if _has_interpolation(record):
        raise UserError(f"task: {path} holds an interpolation (${{…}}); expected plain values, so it is not used")
    return record


def _schema(record: Mapping[str, object]) -> Iterator[tuple[str, str, bool]]:
    """Each entry of a record: its name, what is expected, and whether it holds; cheap ones first."""
    config, backbone, classes, images = (record.get(key) for key in ("config", "backbone", "classes", "input"))
    size = record.get("eval_batch_size")
    yield "config", "a mapping", isinstance(config, dict)
    yield "bank", "64 hexadecimal digits, or null", "bank" in record and _is_hash(record["bank"], null=True)
    yield (
        "backbone",
        "a name and a fingerprint",
        isinstance(backbone, dict) and all(isinstance(backbone.get(name), str) for name in ("name", "fingerprint")),
    )
    yield (
        "classes",
        "a list of names",
        isinstance(classes, list) and bool(classes) and all(isinstance(name, str) for name in classes),
    )
    yield "classes", "different names", len(set(map(str, _list(classes)))) == len(_list(classes))
    yield "input", "a mapping", isinstance(images, dict)
    yield "eval_batch_size", "a positive integer", _is_count(size)
    if "templates" in record:
        yield "templates", "groups, and how their templates were made", _are_templates(record["templates"])
    if "checksum" in record:
        yield "checksum", "64 hexadecimal digits", _is_hash(record["checksum"])
    if "metrics" in record:
        metrics = record["metrics"]
        yield "metrics", "a mapping of numbers", isinstance(metrics, dict) and all(map(_is_number, metrics.values()))


def _are_templates(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("groups"), list) or "solver" not in found:
        return False
    for group in found["groups"]:
        if not (isinstance(group, list) and len(group) > 3 and _is_count(group[1]) and _is_count(group[2])):
            return False
        if not all(isinstance(name, str) for name in (group[0], *group[3:])):
            return False
    if found["solver"] is None:
        return True
    return (
        isinstance(found["solver"], str)
        and isinstance(found.get("seed"), int)
        and _is_count(found.get("num_sets"))
        and isinstance(found.get("options", {}), dict)
        and isinstance(found.get("weights"), str)
    )


def _is_hash(value: object, *, null: bool = False) -> bool:
    return (null and value is None) or (isinstance(value, str) and _HASH.fullmatch(value) is not None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _shown(record: Mapping[str, object], key: str) -> str:
    return repr(record[key])[:80] if key in record else "nothing"


def _refuse(constant: str) -> object:
    raise ValueError(constant)  # NaN and infinity are no JSON


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
        text = file.read(length) if length <= min(size, _LARGEST) else b""
    try:
        header = json.loads(text)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, which is no safetensors file or is cut short"
        ) from None
    if size < 8 + length + end:
        raise UserError(f"task: {path} is cut short: {size} bytes, where its header announces {8 + length + end}")
    found: _Header = header
    return found
