"""Keys of a recipe that were typed, or are searched over, though their values do not matter."""

from __future__ import annotations

import dataclasses

from recast_exp import adapters
from recast_exp.config.fields import unmet
from recast_exp.config.schema import Config, MimicryConfig
from recast_exp.plugins import SOLVERS
from recast_exp.recast.solvers import options_of
from recast_exp.training.objectives import from_config

_OF_SOLVERS = {field.name for field in dataclasses.fields(MimicryConfig)} - {"name", "seed", "options"}


def no_effect(key: str, settings: Config) -> str | None:
    """Why the value of a key of the recipe does not matter for a job; None where it may."""
    options, schedule = settings.optimizer, settings.scheduler.name
    if key in ("scheduler.step_size", "scheduler.adapter_step_size", "scheduler.gamma") and schedule != "step":
        return f"scheduler={schedule} has no steps"
    if key == "scheduler.adapter_step_size" and settings.adapter["name"] == "none":
        return "there is no adapter to train"
    if key in ("dataset.views", "head.views") and settings.dataset.transform == "none":
        return "dataset.transform=none alters no image"
    present = {
        "coefficients": settings.model.method == "recast",
        "adapter": settings.adapter["name"] != "none",
        "backbone": settings.model.method == "full",
    }
    if key.startswith(("recast.", "mimicry.")) and not present["coefficients"]:
        return f"model={settings.model.name} has no templates"
    section, _, name = key.partition(".")
    if section == "mimicry" and name in _OF_SOLVERS - {*options_of(SOLVERS.load(settings.mimicry.name))}:
        return f"mimicry={settings.mimicry.name} has no such option"
    if section == "adapter" and present["adapter"] and (needed := unmet(adapters.from_config(settings.adapter), name)):
        return f"adapter.{needed} is not set"
    for kind, there in present.items():
        if key in (f"optimizer.{kind}_lr", f"optimizer.{kind}_weight_decay") and not there:
            return f"there is no {kind} to train"
    if key == "optimizer.coefficients_pull" and not present["coefficients"]:
        return "there are no coefficients to train"
    if key in ("optimizer.lr_scale", "trainer.head_first_epochs") and not any(present.values()):
        return "only the head trains"
    if key in ("optimizer.momentum", "optimizer.nesterov") and options.name != "sgd":
        return f"optimizer={options.name} has none"
    objective = from_config(settings.training)
    if section == "training" and (needed := unmet(objective, name)):
        return f"training.{needed} is not set"
    if key == "dataset.batch_size" and objective.episodes() is not None:
        return f"a step of training={settings.training['name']} has training.images"
    trains = objective.trains
    if key == "optimizer.head_weight_decay" and "head" not in trains:
        return f"training={settings.training['name']} solves the head"
    for common in ("lr", "weight_decay"):
        if key != f"optimizer.{common}":
            continue
        own = {kind: getattr(options, f"{kind}_{common}") for kind in present}
        head = "head" in trains and (common == "lr" or options.head_weight_decay is None)
        if not head and not any(there and own[kind] is None for kind, there in present.items()):
            names = [f"optimizer.{kind}_{common}" for kind, there in present.items() if there]
            return f"what trains has {', '.join(names) or 'a solved head'} instead"
    return None
