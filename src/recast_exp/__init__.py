"""RECAST (ICLR 2025, arXiv 2411.16870) for timm models, with adapters, and experiments with Hydra and Lightning.

A program takes these steps; the names are imported when they are first used, so `import recast_exp` takes no time:

1. `find_groups` chooses layers that share templates, `mimic` finds templates and coefficients for them (`Banks`).
2. `inject` makes the weights combinations of the templates; `inject_adapter` adds an adapter such as `MeLo(rank=4)`.
3. After training, `save_task` writes what was trained; `load_task` and `apply_task` bring it to a fresh timm model.
4. `merge` leaves a plain timm model.

Example:
    >>> import timm
    >>> import recast_exp
    >>> model = timm.create_model("vit_tiny_patch16_224", num_classes=5).requires_grad_(False)
    >>> groups = recast_exp.find_groups(model, targets=["*.attn.qkv"])
    >>> coefficients = recast_exp.inject(model, recast_exp.mimic(model, groups))
    >>> sum(model.get_parameter(name).numel() for name in coefficients.values())
    48
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recast_exp.adapters import Adapter, inject_adapter
    from recast_exp.adapters.adaptformer import AdaptFormer
    from recast_exp.adapters.bitfit import BitFit
    from recast_exp.adapters.clr import CLR
    from recast_exp.adapters.compander import Compander
    from recast_exp.adapters.film import FiLM
    from recast_exp.adapters.growth import Growth
    from recast_exp.adapters.hydra_lora import HydraLoRA
    from recast_exp.adapters.last_block import LastBlock
    from recast_exp.adapters.layernorm import LayerNormTuning
    from recast_exp.adapters.melo import MeLo
    from recast_exp.adapters.none import NoAdapter
    from recast_exp.adapters.peft import Peft
    from recast_exp.adapters.piggyback import Piggyback
    from recast_exp.adapters.ssf import SSF
    from recast_exp.adapters.tera import TeRA
    from recast_exp.adapters.transformed import Transformed
    from recast_exp.config.schema import RecastConfig
    from recast_exp.errors import MissingInputError, RecastError, UnfitError, UnknownNameError, UserError
    from recast_exp.models.loading import Task, apply_task, load_task
    from recast_exp.recast import Banks, Group, TemplateBank, find_groups, inject, mimic
    from recast_exp.tasks.kept_task import TaskInfo
    from recast_exp.tasks.library import merge, save_task
    from recast_exp.tasks.merging import MergedTasks, merge_tasks
    from recast_exp.tasks.model import RecastModel
    from recast_exp.tasks.prediction import Predicted
else:  # not for type checkers, to which every misspelt name would be one of this package

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used (PEP 562)."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


__version__ = "0.1.0"

__all__ = [
    "CLR",
    "SSF",
    "AdaptFormer",
    "Adapter",
    "Banks",
    "BitFit",
    "Compander",
    "FiLM",
    "Group",
    "Growth",
    "HydraLoRA",
    "LastBlock",
    "LayerNormTuning",
    "MeLo",
    "MergedTasks",
    "MissingInputError",
    "NoAdapter",
    "Peft",
    "Piggyback",
    "Predicted",
    "RecastConfig",
    "RecastError",
    "RecastModel",
    "Task",
    "TaskInfo",
    "TeRA",
    "TemplateBank",
    "Transformed",
    "UnfitError",
    "UnknownNameError",
    "UserError",
    "__version__",
    "apply_task",
    "find_groups",
    "inject",
    "inject_adapter",
    "load_task",
    "merge",
    "merge_tasks",
    "mimic",
    "save_task",
]

_NAMES = {
    "recast": ("Banks", "Group", "TemplateBank", "find_groups", "inject", "mimic"),
    "adapters": ("Adapter", "inject_adapter"),
    "adapters.adaptformer": ("AdaptFormer",),
    "adapters.bitfit": ("BitFit",),
    "adapters.clr": ("CLR",),
    "adapters.film": ("FiLM",),
    "adapters.last_block": ("LastBlock",),
    "adapters.layernorm": ("LayerNormTuning",),
    "adapters.melo": ("MeLo",),
    "adapters.compander": ("Compander",),
    "adapters.growth": ("Growth",),
    "adapters.hydra_lora": ("HydraLoRA",),
    "adapters.ssf": ("SSF",),
    "adapters.tera": ("TeRA",),
    "adapters.transformed": ("Transformed",),
    "adapters.none": ("NoAdapter",),
    "adapters.peft": ("Peft",),
    "adapters.piggyback": ("Piggyback",),
    "config.schema": ("RecastConfig",),
    "errors": ("MissingInputError", "RecastError", "UnfitError", "UnknownNameError", "UserError"),
    "tasks.kept_task": ("TaskInfo",),
    "tasks.library": ("merge", "save_task"),
    "models.loading": ("Task", "apply_task", "load_task"),
    "tasks.merging": ("MergedTasks", "merge_tasks"),
    "tasks.prediction": ("Predicted",),
    "tasks.model": ("RecastModel",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
