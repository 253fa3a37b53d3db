"""The record in the header of a task file: it says what the file belongs to. Read without torch or safetensors."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta

from recast_exp.config.schema import is_background
from recast_exp.errors import MissingInputError, UserError
from recast_exp.files import user_path
from recast_exp.runs import hub
from recast_exp.schemas import checked, parse

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


Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=1, lt=2**31)]


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
    num_sets: NotRequired[Count]
    options: NotRequired[dict[str, Any]]
    weights: NotRequired[str]
    dtype: NotRequired[Literal["float32", "bfloat16", "int8"]]


class _Group(TypedDict):
    """What an entry of `Templates.groups` holds, sorted by type."""

    names: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=2)]
    numbers: list[Count]


class _Versioned(TypedDict):
    """What is read of a record before its version is known."""

    format: Count


_Share = Annotated[float, Meta(ge=0, le=1)]
_Scale = Annotated[float, Meta(ge=1e-6, le=1)]
Mean = Annotated[list[_Share], Meta(min_length=3, max_length=3)]
Std = Annotated[list[_Scale], Meta(min_length=3, max_length=3)]
CropPct = Annotated[float, Meta(ge=0.1, le=2)]
Interpolation = Literal["bilinear", "bicubic"]


class InputRecord(TypedDict):
    """How images are prepared: `data.preprocessing.InputSpec`. Files before version 0.1 lack the last three."""

    size: Annotated[int, Meta(ge=8, le=4096)]
    mean: Mean
    std: Std
    crop_pct: CropPct
    interpolation: Interpolation
    squash: NotRequired[bool]
    background: NotRequired[str]
    orient: NotRequired[bool]


class TaskRecord(TypedDict):
    """The record of a task file.

    Attributes:
        computation: What the network computes otherwise than the one that timm makes by the backbone's name and the
            arguments (`models.computation.Differences`). Files of the command line, whose networks timm makes so, and
            those of `save_task` before version 0.1 have none.
    """

    format: int
    version: NotRequired[str]
    config: dict[str, Any]
    bank: Hash | None
    templates: NotRequired[Templates]
    backbone: Pretrained
    classes: Annotated[list[str], Meta(min_length=1)]
    test_images: NotRequired[str]
    input: InputRecord
    eval_batch_size: Count
    metrics: NotRequired[dict[str, int | float]]
    computation: NotRequired[dict[str, dict[str, Any]]]
    checksum: NotRequired[Hash]


_Header = TypedDict("_Header", {"__metadata__": NotRequired[dict[str, str]]})
"""The part of a header that is ours; next to it are the tensors."""

_LARGEST = 100_000_000  # bytes of a header, as safetensors has it


def task_files(text: str) -> list[Path]:
    """The task files that `task=` names: one, or several in brackets (`[birds.safetensors,hf://owner/pets]`).

    Raises:
        UserError: If an address of the Hub is none.
        MissingInputError: If the Hub has no such file.
    """
    if text.startswith("[") and text.endswith("]") and not user_path(text).is_file():
        return [hub.local(name.strip().strip("'\"")) for name in text[1:-1].split(",") if name.strip()]
    return [hub.local(text)] if text else []


def read_record(path: str | Path) -> TaskRecord:
    """Read the record of a task file from the header of its safetensors, without torch or safetensors.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If the file is not a task file, is cut short, or was written by a newer version.
    """
    path = Path(path)
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise MissingInputError(f"task: expected the task.safetensors of a run, got {path}, which {state}")
    header = _header(path)
    try:
        content = parse(header.get("__metadata__", {})[RECORD_KEY], dict[str, Any])
        version = checked(content, _Versioned)["format"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, a safetensors file that holds no task"
        ) from None
    if version > FORMAT:
        raise UserError(
            f"task: {path} has format {version}, this version reads up to {FORMAT}; update recast_exp to read it"
        )
    unknown = [key for key in content if key not in TaskRecord.__annotations__]
    if isinstance(content.get("input"), dict):
        unknown += [f"input.{key}" for key in content["input"] if key not in InputRecord.__annotations__]
    if unknown:
        raise UserError(f"task: {path} has the entry {unknown[0][:80]!r}, which this version does not know")
    try:
        record = checked(content, TaskRecord)
        _check(record)
    except ValueError as error:
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, whose record is damaged ({error})"
        ) from error
    # Names of classes are never resolved, and a folder may be called anything
    if _has_interpolation({name: value for name, value in record.items() if name != "classes"}):
        raise UserError(f"task: {path} holds an interpolation (${{…}}); expected plain values, so it is not used")
    return record


def _check(record: TaskRecord) -> None:
    """Check what types cannot say.

    Raises:
        ValueError: If something does not hold.
    """
    if len(set(record["classes"])) < len(record["classes"]):
        raise ValueError("classes: expected different names")
    if not is_background(record["input"].get("background", "drop")):
        raise ValueError(f"input.background: expected a colour, got {record['input']['background'][:40]!r}")
    # Names of folders that are no UTF-8 are kept as Python keeps them
    "".join(record["classes"]).encode(errors="surrogateescape")
    if (templates := record.get("templates")) is None:
        return
    for index, group in enumerate(templates["groups"]):
        try:
            name, num_templates, num_blocks, *layers = group
            checked({"names": [name, *layers], "numbers": [num_templates, num_blocks]}, _Group)
            "".join([name, *layers]).encode()  # half a surrogate pair is no text
        except ValueError as error:
            raise ValueError(
                f"templates.groups[{index}]: expected a name, the numbers of templates and of blocks, and layers"
            ) from error
    if templates["solver"] is not None and (missing := {"seed", "num_sets", "weights"} - templates.keys()):
        raise ValueError(f"templates: the entry `{min(missing)}` is missing")


def _has_interpolation(value: object) -> bool:
    """Whether a text anywhere in a value would be resolved: to an environment variable, say."""
    if isinstance(value, Mapping):
        return any(map(_has_interpolation, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return any(map(_has_interpolation, value))
    return isinstance(value, str) and "${" in value


def _header(path: Path) -> _Header:
    """The header of a safetensors file: eight bytes of length, then JSON, then the tensors it announces."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size, _LARGEST) else b""
    except OSError as error:
        raise UserError(f"task: {path} cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text)
        places = [tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"]
        end = max((operator.index(stop) for _, stop in places), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise UserError(
            f"task: expected the task.safetensors of a run, got {path}, which is no safetensors file or is cut short"
        ) from None
    if size < 8 + length + end:
        raise UserError(f"task: {path} is cut short: {size} bytes, where its header announces {8 + length + end}")
    found: _Header = header
    return found
