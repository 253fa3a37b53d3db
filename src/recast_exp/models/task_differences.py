"""What tasks have changed in the weights of a backbone, from their task files: templates of the kind `tasks`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.errors import UserError, section
from recast_exp.models import library
from recast_exp.models.loading import load_task, restore


@torch.no_grad()
def differences_of(network: nn.Module, paths: Sequence[str], cache: Path) -> list[dict[str, Tensor]]:
    """The difference of each task's weights to those of the backbone.

    Args:
        network: The backbone with its pretrained weights, without a classifier; it is not changed.
        paths: The task files.
        cache: The folder of the cache, for template banks.

    Returns:
        For each task, layer → [rows, ...], float32 on the CPU, for the Linear and Conv2d layers that it has changed.

    Raises:
        MissingInputError: If a file, or the template bank that it needs, is not there.
        UserError: If a task belongs to other weights, or has changed no weight.
    """
    plain = {name: module.weight for name, module in network.named_modules() if isinstance(module, _LAYERS)}
    found: list[dict[str, Tensor]] = []
    for path in paths:
        own = copy.deepcopy(network)
        with section("recast.tasks: "):
            restore(own, load_task(path), cache=cache)
        merged = dict(library.merge(own).named_modules())
        changes = {
            name: (change.weight - weight).float().cpu()
            for name, weight in plain.items()
            if isinstance(change := merged.get(name), _LAYERS) and not torch.equal(change.weight, weight)
        }
        if not changes:
            raise UserError(
                f"recast.tasks: expected tasks that have changed weights, got {path}, which has changed none: it has "
                "neither coefficients nor an adapter that becomes part of the weights"
            )
        found.append(changes)
    return found


_LAYERS = (nn.Linear, nn.Conv2d)
