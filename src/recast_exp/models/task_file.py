"""Task files: the parameters of one task in a small safetensors file.

A file holds the tensors of `AdaptedModel.file_tensors` and a record (JSON in the metadata) of all that they depend on:
the template bank by its content hash, the backbone by its fingerprint, the configuration, the classes and the
preprocessing. `models.library` makes the steps of a program from these functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast_exp import __version__
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import UserError
from recast_exp.files import replacing
from recast_exp.models.adapted import AdaptedModel
from recast_exp.runs.task_header import FORMAT, RECORD_KEY, TaskRecord, read_record


def make_record(adapted: AdaptedModel, config: Mapping[str, object], **facts: object) -> dict[str, object]:
    """The record of a task file: the configuration of the model, the bank's hash, and the given facts.

    Args:
        adapted: The model.
        config: The configuration that describes the model, as nested mappings (`config.keys.recorded`).
        **facts: Further entries (backbone, classes, input, …).
    """
    bank = adapted.banks.hash if adapted.banks else None
    return {"format": FORMAT, "version": __version__, "config": dict(config), "bank": bank, **facts}


def write_task(path: Path, tensors: dict[str, Tensor], record: Mapping[str, object]) -> None:
    """Write a task file atomically.

    Args:
        path: The file; an old one is replaced.
        tensors: `AdaptedModel.file_tensors`.
        record: `make_record`.
    """
    with replacing(path) as temporary:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, {RECORD_KEY: json.dumps(record, ensure_ascii=False)})


def read_task(path: Path) -> tuple[dict[str, Tensor], TaskRecord]:
    """Read a task file: its tensors and its record.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If it is damaged, or not a task file of this version.
    """
    record = read_record(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"task: expected a whole safetensors file, got {path} ({error})") from error
    return tensors, record


@torch.no_grad()
def copy_into(adapted: AdaptedModel, tensors: dict[str, Tensor]) -> None:
    """Copy the parameters of a task into a model, in place.

    Args:
        adapted: The model.
        tensors: The tensors of a task file, or `AdaptedModel.task_tensors` of a model of the same kind.

    Raises:
        UserError: If names or shapes differ from the model's; nothing is changed then.
    """
    live, packers = adapted.task_tensors(), adapted.packers()

    def is_packed(name: str) -> bool:
        return name in packers and tensors[name].shape == packers[name].pack().shape

    different = sorted(set(live) ^ set(tensors)) or sorted(
        name for name in live if live[name].shape != tensors[name].shape and not is_packed(name)
    )
    if different:
        raise UserError(
            f"task: expected the parameters of this model, got others; they differ in {', '.join(different[:3])}"
        )
    for name, tensor in live.items():
        if live[name].shape == tensors[name].shape:
            tensor.copy_(tensors[name])
        else:
            packers[name].unpack(tensors[name])


def input_record(spec: InputSpec) -> dict[str, object]:
    """The preprocessing as the record keeps it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}


def input_of_record(entries: Mapping[str, object]) -> InputSpec:
    """The inverse of `input_record`.

    Raises:
        TypeError: If an entry is missing or unknown.
    """
    values: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in entries.items()}
    return InputSpec(**values)
