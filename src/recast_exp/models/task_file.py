"""One task's numbers: saved to and loaded from a small safetensors file, and counted.

The file holds the tensors of `AdaptedModel.task_tensors` and a record (JSON in the metadata) of what they belong to:
the template bank by content hash, the backbone by fingerprint, the configuration, class names and preprocessing.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recast_exp import __version__
from recast_exp.adapters._base import NORMS
from recast_exp.data.transforms import InputSpec
from recast_exp.errors import UserError
from recast_exp.files import replacing
from recast_exp.models.adapted import AdaptedModel
from recast_exp.runs.adopt import FORMAT, RECORD_KEY, read_record

# What is a matter of this machine or this run, not of the task, stays out of the record.
_LOCAL = {
    "model": ("weights",),
    "dataset": (
        *("path", "download", "cache", "num_workers", "prefetch_factor", "pin_memory"),
        *("batch_size", "eval_batch_size"),
    ),
}


def make_record(cfg: DictConfig, adapted: AdaptedModel, **facts: Any) -> dict[str, Any]:
    """The record of a task file: configuration, bank hash, and the given facts (backbone, classes, input, …)."""
    parts: dict[str, Any] = {"seed": cfg.seed}
    parts["trainer"] = {name: cfg.trainer[name] for name in ("precision", "limit_batches")}
    for node in ("model", "recast", "mimicry", "adapter", "dataset"):
        values = OmegaConf.to_container(cfg[node], resolve=True)
        assert isinstance(values, dict)
        parts[node] = {name: value for name, value in values.items() if name not in _LOCAL.get(node, ())}
    bank = adapted.banks.hash if adapted.banks else None
    return {"format": FORMAT, "version": __version__, "config": parts, "bank": bank, **facts}


def save_task(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a task file atomically."""
    with replacing(path) as temporary:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, {RECORD_KEY: json.dumps(record, ensure_ascii=False)})


def load_task(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
        raise UserError(f"task: {path} is not a whole safetensors file ({error})") from error
    return tensors, record


@torch.no_grad()
def apply_task(adapted: AdaptedModel, tensors: dict[str, Tensor]) -> None:
    """Copy a task's numbers into a model, in place.

    Raises:
        UserError: If the file's names or shapes are not the model's; nothing is changed then.
    """
    live, packers = adapted.task_tensors(), adapted.packers()

    def is_packed(name: str) -> bool:
        return name in packers and tensors[name].shape == packers[name].pack().shape

    different = sorted(set(live) ^ set(tensors)) or sorted(
        name for name in live if live[name].shape != tensors[name].shape and not is_packed(name)
    )
    if different:
        raise UserError(f"task: the file does not fit the model, they differ in {', '.join(different[:3])}")
    for name, tensor in live.items():
        if live[name].shape == tensors[name].shape:
            tensor.copy_(tensors[name])
        else:
            packers[name].unpack(tensors[name])


def count(adapted: AdaptedModel, task_file_bytes: int) -> dict[str, Any]:
    """Count the numbers of a model and its task.

    Returns:
        Whole numbers: `coefficients`, `adapter`, `buffers` and `backbone_trained` with their sum `task_specific`;
        `adapter_norm`, those among the adapter's that are the backbone's own scales and shifts of norms;
        `head`; `templates`; `frozen` (all other parameters); `total` (all parameters and the moved buffers);
        `task_bits`, the size of `task_specific`; `task_file_bytes`; and `layers`: for each layer with trained numbers,
        how many of each kind.
    """
    network = adapted.network
    names = {"backbone": "backbone_trained"}
    tensors = adapted.task_tensors()
    kinds = dict.fromkeys(("coefficients", "adapter", "buffers", "backbone_trained", "head"), 0)
    layers: dict[str, dict[str, int]] = {}
    bits, norm = 0, 0
    packers = adapted.packers()
    for name, tensor in tensors.items():
        kind, _, public = name.partition("/")
        kind = names.get(kind, kind)
        kinds[kind] += tensor.numel()
        layer = public if kind == "coefficients" else public.rpartition(".")[0]
        counts = layers.setdefault(layer, {})
        counts[kind] = counts.get(kind, 0) + tensor.numel()
        if kind != "head":
            bits += tensor.numel() * (packers[name].bits if name in packers else tensor.element_size() * 8)
        if kind == "adapter":
            owner, _, _ = adapted.trainable["adapter"][public].rpartition(".")
            norm += tensor.numel() * isinstance(network.get_submodule(owner), NORMS)
    head = kinds.pop("head")
    templates = sum(tensor.numel() for tensor in adapted.banks.templates.values()) if adapted.banks else 0
    total = sum(parameter.numel() for parameter in network.parameters()) + kinds["buffers"]
    task_specific = sum(kinds.values())
    return {
        **kinds,
        "adapter_norm": norm,
        "task_specific": task_specific,
        "head": head,
        "templates": templates,
        "frozen": total - task_specific - head - templates,
        "total": total,
        "task_bits": bits,
        "task_file_bytes": task_file_bytes,
        "layers": layers,
    }


def input_record(spec: InputSpec) -> dict[str, Any]:
    """The preprocessing as the record keeps it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(spec).items()}
