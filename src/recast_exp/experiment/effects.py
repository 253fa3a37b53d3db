"""Keys of a recipe that were typed, or are searched over, though their values do not matter."""

from __future__ import annotations

from recast_exp.config.schema import Config
from recast_exp.training.objectives import from_config


def no_effect(key: str, settings: Config) -> str | None:
    """Why the value of a key of the recipe does not matter for a job; None where it may."""
    options, schedule = settings.optimizer, settings.scheduler.name
    if key in ("scheduler.step_size", "scheduler.adapter_step_size", "scheduler.gamma") and schedule != "step":
        return f"scheduler={schedule} has no steps"
    present = {
        "coefficients": settings.model.method == "recast",
        "adapter": settings.adapter["name"] != "none",
        "backbone": settings.model.method == "full",
    }
    for kind, there in present.items():
        if key in (f"optimizer.{kind}_lr", f"optimizer.{kind}_weight_decay") and not there:
            return f"there is no {kind} to train"
    if key in ("optimizer.momentum", "optimizer.nesterov") and options.name != "sgd":
        return f"optimizer={options.name} has none"
    if key == "optimizer.lr":
        own = {"coefficients": options.coefficients_lr, "adapter": options.adapter_lr, "backbone": options.backbone_lr}
        trains = from_config(settings.training).trains
        if "head" not in trains and not any(present[kind] and own[kind] is None for kind in trains):
            names = ", ".join(f"optimizer.{kind}_lr" for kind in trains if present[kind]) or "a solved head"
            return f"what trains has {names} instead"
    return None
