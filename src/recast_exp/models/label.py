"""What tables and plots call a method: `RECAST-Att`, `MeLo`, `RECAST-Att + MeLo`, `linear probe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recast_exp.adapters import from_config
from recast_exp.config.schema import ModelConfig


def method_label(label: str, model: ModelConfig, adapter: Mapping[str, Any]) -> str:
    """The label of a method: its own, or made of those of its model and its adapter.

    An adapter on a frozen backbone goes by its own name.

    Args:
        label: Its own label; empty for none.
        model: Its model.
        adapter: Name and options of its adapter.
    """
    if label:
        return label
    own, added = model.label or model.name, from_config(adapter).label
    if not added:
        return own
    return added if model.method == "frozen" else f"{own} + {added}"
