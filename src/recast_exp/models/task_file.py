"""Task files: the parameters of one task in a small safetensors file.

A file holds

- `coefficients` [M], float32, or float64 of such a model: those of all layers, one after the other in the order of
  `Banks.coefficients`;
- `relative`, float32: the same as A of `recast.formulas.relative`, [B, L] for each layer, one after the other; only
  where the templates rebuild the weights;
- `adapter/…`, `head/…`, `backbone/…`, `buffers/…`: the other parameters of `AdaptedModel.file_tensors`;
- `fixed/…`: tensors of the adapter that do not train, random ones among them;

and a record (JSON in the metadata) of all that they depend on: the template bank by its content hash and how it was
made, the backbone by its fingerprint, the configuration, the classes and the preprocessing; and a checksum of tensors
and record, which finds a file that was damaged on its way, not one that was forged. With the very bank, the
coefficients are taken to the bit; with templates that were made again and differ in their last bits, from `relative`.
`models.library` and `models.loading` make the steps of a program from these functions.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast_exp import __version__
from recast_exp.data.preprocessing import InputSpec
from recast_exp.errors import UserError
from recast_exp.files import replacing
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.weights import content_hash
from recast_exp.recast import Banks, Group, Origin
from recast_exp.runs.task_header import FORMAT, RECORD_KEY, InputRecord, TaskRecord, Templates, read_record

COEFFICIENTS, RELATIVE, FIXED = "coefficients", "relative", "fixed/"


def make_record(adapted: AdaptedModel, config: Mapping[str, object], **facts: object) -> dict[str, object]:
    """The record of a task file: the configuration of the model, its templates, and the given facts.

    Args:
        adapted: The model.
        config: The configuration that describes the model, as nested mappings (`config.keys.recorded`).
        **facts: Further entries (backbone, classes, input, …).
    """
    banks = adapted.banks
    templates = {"templates": _templates(banks)} if banks else {}
    bank = banks.hash if banks else None
    return {"format": FORMAT, "version": __version__, "config": dict(config), "bank": bank, **templates, **facts}


def _templates(banks: Banks) -> Templates:
    groups = [[group.name, group.num_templates, group.num_blocks, *group.layers] for group in banks.groups]
    if banks.origin is None:
        return {"groups": groups, "solver": None}
    usual = {"options": {}, "dtype": "float32"}
    made = {name: value for name, value in asdict(banks.origin).items() if usual.get(name) != value}
    return {"groups": groups, **made}  # type: ignore[typeddict-item]


def groups_and_origin(record: TaskRecord) -> tuple[list[Group], Origin | None]:
    """The groups of a record's templates, and how these were made; None where that is not known."""
    templates = record.get("templates")
    if templates is None:
        return [], None
    groups = [Group(name, tuple(layers), count, blocks) for name, count, blocks, *layers in templates["groups"]]
    if templates["solver"] is None:
        return groups, None
    return groups, Origin(
        templates["solver"],
        templates["seed"],
        templates["num_sets"],
        templates.get("options", {}),
        templates["weights"],
        templates.get("dtype", "float32"),
    )


def write_task(path: Path, adapted: AdaptedModel, record: Mapping[str, object]) -> None:
    """Write a task file atomically.

    Args:
        path: The file; an old one is replaced.
        adapted: The model.
        record: `make_record`.

    Raises:
        UserError: If a value is not finite; the old file stays as it is.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in adapted.file_tensors().items()}
    if adapted.banks and COEFFICIENTS in adapted.trainable:
        layers = list(adapted.banks.coefficients)
        given = {layer: tensors.pop(f"{COEFFICIENTS}/{layer}") for layer in layers}
        own = {layer: tensor if tensor.dtype == torch.float64 else tensor.float() for layer, tensor in given.items()}
        tensors[COEFFICIENTS] = torch.cat([own[layer].flatten() for layer in layers])
        if not adapted.banks.has_own_kind:
            relative = adapted.banks.relative(own)
            tensors[RELATIVE] = torch.cat([relative[layer].flatten() for layer in layers]).float()
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    for name, tensor in whole.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"task: expected finite numbers, got NaN or infinity in {name}; {path} is not written; train "
                "again with a lower learning rate"
            )
    record = {**record, "checksum": _checksum(whole, record)}
    with replacing(path) as temporary:
        save_file(whole, temporary, {RECORD_KEY: json.dumps(record, ensure_ascii=False, separators=(",", ":"))})


def _checksum(tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> str:
    """sha256 of tensors and record, but for the record's own checksum."""
    entries = json.loads(json.dumps({name: value for name, value in record.items() if name != "checksum"}))
    text = json.dumps(entries, sort_keys=True) + content_hash(tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def read_task(path: Path) -> tuple[dict[str, Tensor], TaskRecord]:
    """Read a task file: its tensors and its record.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If it is damaged, not a task file of this version, or holds values that are not finite.
    """
    record = read_record(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"task: expected a whole safetensors file, got {path} ({error})") from error
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not torch.isfinite(tensor).all()):
            raise UserError(f"task: {path} holds values in {name} that are not finite numbers")
    # Files of earlier versions have none
    if "checksum" in record and record["checksum"] != _checksum(tensors, record):
        raise UserError(f"task: {path} is damaged: its content is not that of its checksum; copy the file again")
    return tensors, record


def for_banks(tensors: Mapping[str, Tensor], record: TaskRecord, banks: Banks | None) -> dict[str, Tensor]:
    """The tensors of a task file as those of a model with these templates: `coefficients/LAYER` [K, B, n].

    Args:
        tensors: Those of the file.
        record: Its record.
        banks: The templates that the task is to go with: those that it was trained with, or others of the same groups,
            for which its coefficients are found from their relative form.

    Raises:
        UserError: If the file's vectors have not as many entries as these groups ask for.
    """
    found = dict(tensors)
    vector, relative = found.pop(COEFFICIENTS, None), found.pop(RELATIVE, None)
    if banks is None or vector is None:
        if vector is not None:
            found[COEFFICIENTS] = vector  # which `copy_into` finds to be one too many
        return found
    shapes = {layer: tuple(start.shape) for layer, start in banks.coefficients.items()}
    if banks.hash == record["bank"] or banks.has_own_kind:
        own = _split(vector, shapes, COEFFICIENTS)
    elif relative is None:
        raise UserError("task: expected the tensor relative next to coefficients, got none")
    else:
        group_of = {layer: len(group.layers) for group in banks.groups for layer in group.layers}
        own = banks.from_relative(
            _split(relative, {layer: (shape[1], group_of[layer]) for layer, shape in shapes.items()}, RELATIVE)
        )
    return found | {f"{COEFFICIENTS}/{layer}": value for layer, value in own.items()}


def relative_form(tensors: Mapping[str, Tensor], record: TaskRecord) -> dict[str, Tensor]:
    """Layer → its row of A [B, L], float32 (`recast.formulas.relative`); nothing for a file of format 1.

    Raises:
        UserError: If the tensor has not as many entries as the record's groups ask for.
    """
    if RELATIVE not in tensors:
        return {}
    shapes = {
        layer: (group.num_blocks, len(group.layers)) for group in groups_and_origin(record)[0] for layer in group.layers
    }
    return _split(tensors[RELATIVE], shapes, RELATIVE)


def _split(vector: Tensor, shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Tensor]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    if vector.ndim != 1 or len(vector) != sum(sizes) or not vector.is_floating_point():
        raise UserError(
            f"task: expected {name} [{sum(sizes)}] of floating-point numbers, got {list(vector.shape)} {vector.dtype}"
        )
    parts = torch.split(vector, sizes)
    return {layer: part.reshape(shape) for part, (layer, shape) in zip(parts, shapes.items(), strict=True)}


@torch.no_grad()
def copy_into(adapted: AdaptedModel, tensors: dict[str, Tensor]) -> None:
    """Copy the parameters of a task into a model, in place.

    Args:
        adapted: The model.
        tensors: The tensors of `for_banks`, or `AdaptedModel.task_tensors` of a model of the same kind. What an adapter
            keeps fixed may be missing.

    Raises:
        UserError: If names, shapes or kinds of numbers differ from the model's; nothing is changed then.
    """
    live, packers, fixed = adapted.task_tensors(), adapted.packers(), adapted.fixed_tensors()
    if any(name.startswith(FIXED) for name in tensors):
        live |= fixed

    def is_packed(name: str) -> bool:
        return name in packers and tensors[name].shape == packers[name].pack().shape

    different = sorted(set(live) ^ set(tensors)) or sorted(
        name
        for name in live
        if not is_packed(name)
        and (
            live[name].shape != tensors[name].shape
            or live[name].is_floating_point() != tensors[name].is_floating_point()
        )
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


def input_record(spec: InputSpec) -> InputRecord:
    """The preprocessing as the record keeps it."""
    entries = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}
    return cast(InputRecord, entries)


def input_of_record(entries: InputRecord) -> InputSpec:
    """The inverse of `input_record`.

    Raises:
        UserError: If the background is unknown.
    """
    values: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in entries.items()}
    return InputSpec(**values)
