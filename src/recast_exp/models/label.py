"""What tables and plots call a method: `RECAST-Att`, `MeLo`, `RECAST-Att + MeLo`, `linear probe`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from recast_exp import adapters
from recast_exp.config.schema import Config


def method_label(settings: Config | DictConfig) -> str:
    """The label of a configuration: its own, or made of those of its model and its adapter.

    An adapter on a frozen backbone goes by its own name.
    """
    if settings.label:
        return str(settings.label)
    model = str(settings.model.label or settings.model.name)
    adapter = adapters.label(OmegaConf.create(dict(settings.adapter)))
    if not adapter:
        return model
    return adapter if settings.model.method == "frozen" else f"{model} + {adapter}"
