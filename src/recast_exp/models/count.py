"""The number of parameters of a model, by kind, and how many of them belong to its task."""

from __future__ import annotations

from recast_exp.adapters import NORMS
from recast_exp.models.adapted import AdaptedModel
from recast_exp.runs.results import Counts


def count(adapted: AdaptedModel, task_file_bytes: int) -> Counts:
    """Count the parameters of a model and its task.

    Args:
        adapted: The model.
        task_file_bytes: Size of its task file.

    Returns:
        Integers: `coefficients`, `adapter`, `buffers` (running statistics of the task) and `backbone_trained`, with
        their sum `task_specific`; `adapter_norm`, the scales and shifts of the backbone's own normalisation layers
        among `adapter`; `head`; `templates`, and their size `template_bits`; `frozen` (all other parameters); `total`
        (all parameters and `buffers`); `task_bits`, the size of `task_specific`; `task_file_bytes`; and `layers`, with
        the number of trained parameters of each kind for each layer that has any.
    """
    network = adapted.network
    names = {"backbone": "backbone_trained"}
    tensors = adapted.task_tensors()
    kinds = dict.fromkeys(("coefficients", "adapter", "buffers", "backbone_trained", "head"), 0)
    layers: dict[str, dict[str, int]] = {}
    heads = {path.rpartition(".")[0] for path in adapted.trainable.get("head", {}).values()}
    bits, norm = 0, 0
    packers = adapted.packers()
    for name, tensor in tensors.items():
        kind, _, public = name.partition("/")
        kind = names.get(kind, kind)
        if kind == "buffers" and public.rpartition(".")[0] in heads:
            kind = "head"  # those of a normalisation within it
        kinds[kind] += tensor.numel()
        layer = public if kind == "coefficients" else public.rpartition(".")[0]
        counts = layers.setdefault(layer, {})
        counts[kind] = counts.get(kind, 0) + tensor.numel()
        if kind != "head":
            bits += tensor.numel() * (packers[name].bits if name in packers else tensor.element_size() * 8)
        if kind == "adapter":
            owner, _, _ = adapted.trainable["adapter"][public].rpartition(".")
            if isinstance(network.get_submodule(owner), NORMS):
                norm += tensor.numel()
    head = kinds.pop("head")
    templates = sum(tensor.numel() for tensor in adapted.banks.templates.values()) if adapted.banks else 0
    total = sum(parameter.numel() for parameter in network.parameters()) + kinds["buffers"]
    task_specific = sum(kinds.values())
    return {
        "coefficients": kinds["coefficients"],
        "adapter": kinds["adapter"],
        "buffers": kinds["buffers"],
        "backbone_trained": kinds["backbone_trained"],
        "adapter_norm": norm,
        "task_specific": task_specific,
        "head": head,
        "templates": templates,
        "template_bits": adapted.banks.template_bits if adapted.banks else 0,
        "frozen": total - task_specific - head - templates,
        "total": total,
        "task_bits": bits,
        "task_file_bytes": task_file_bytes,
        "layers": layers,
    }
