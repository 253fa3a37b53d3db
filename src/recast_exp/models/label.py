"""The name of a method in tables and plots: `RECAST-Att`, `MeLo`, `RECAST-Att + MeLo`, `linear probe`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recast_exp.adapters import from_config
from recast_exp.config.schema import ModelConfig


def method_label(label: str, model: ModelConfig, adapter: Mapping[str, object]) -> str:
    """The label of a method: the given one, or else that of its model, of its adapter, or of both.

    An adapter on a frozen backbone goes by its own label.

    Args:
        label: The method's own label; empty for none.
        model: Its model.
        adapter: Name and options of its adapter.
    """
    if label:
        return label
    own, added = model.label or model.name, from_config(adapter).label
    if not added:
        return own
    return added if model.method == "frozen" else f"{own} + {added}"


def short_name(model: ModelConfig, adapter: Mapping[str, object]) -> str:
    """A method by the names of its options: `vit_att`, or `vit_att + melo`."""
    name = adapter["name"]
    return model.name if name == "none" else f"{model.name} + {name}"


def run_title(model: ModelConfig, adapter: Mapping[str, object], dataset: str, seed: int | None = None) -> str:
    """The title of a run: its method, dataset, backbone, and its seed if it has one alone."""
    backbone = str(model.backbone)
    if model.weights:
        backbone = f"{backbone.partition('.')[0]} with {Path(model.weights).name}"
    parts = [f"{short_name(model, adapter)} on {dataset}", backbone]
    return " · ".join(parts if seed is None else [*parts, f"seed {seed}"])
