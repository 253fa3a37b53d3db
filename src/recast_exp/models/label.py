"""What tables and plots call a method: `RECAST-Att`, `MeLo`, `RECAST-Att + MeLo`, `linear probe`."""

from __future__ import annotations

from omegaconf import DictConfig

from recast_exp import adapters


def method_label(cfg: DictConfig) -> str:
    """The label of a configuration: its own, or made of those of its model and its adapter.

    An adapter on a frozen backbone goes by its own name.
    """
    if cfg.label:
        return str(cfg.label)
    model, adapter = str(cfg.model.label or cfg.model.name), adapters.from_config(cfg.adapter).label
    if not adapter:
        return model
    return adapter if cfg.model.method == "frozen" else f"{model} + {adapter}"
