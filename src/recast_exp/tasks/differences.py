"""What tasks have changed in the weights of a backbone, from their task files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.errors import UserError, section
from recast_exp.models.loading import Task, load_task, restore
from recast_exp.tasks import library


@dataclass(frozen=True, eq=False)
class Changes:
    """What a task has changed in a backbone.

    Attributes:
        layers: Layer → difference [rows, ...] of its weight, float32 on the CPU, for the Linear and Conv2d layers that
            it has changed.
        head: Name → parameter of its head.
        others: Names of all else that it has changed or added, such as biases and modules that do not merge.
    """

    layers: dict[str, Tensor]
    head: dict[str, Tensor]
    others: list[str]


@torch.no_grad()
def changes_of(network: nn.Module, task: Task, cache: Path) -> Changes:
    """Compare the merged model of a task with its backbone.

    Args:
        network: The backbone with its pretrained weights, without a classifier; it is not changed.
        task: The task.
        cache: The folder of the cache, for template banks.

    Raises:
        MissingInputError: If the template bank that the task needs is not there.
        UserError: If it belongs to other weights.
    """
    own = copy.deepcopy(network)
    adapted = restore(own, task, cache=cache)
    head = {name: parameter.detach().clone() for name, parameter in adapted.parameters("head")}
    of_head = set(adapted.trainable.get("head", {}).values())
    before = network.state_dict()
    weights = {f"{name}.weight" for name in weighted_layers(network)}
    layers: dict[str, Tensor] = {}
    others: list[str] = []
    for name, tensor in library.merge(own).state_dict().items():
        if name in of_head or name.endswith("num_batches_tracked"):
            continue
        if name in weights:
            if not torch.equal(tensor, before[name]):
                layers[name.removesuffix(".weight")] = (tensor - before[name]).float().cpu()
        elif name not in before or not torch.equal(tensor, before[name]):
            others.append(name)
    return Changes(layers, head, others)


def differences_of(network: nn.Module, paths: Sequence[str], cache: Path) -> list[dict[str, Tensor]]:
    """The templates of the kind `tasks`: the difference of each task's weights to those of the backbone.

    Args:
        network: The backbone with its pretrained weights, without a classifier; it is not changed.
        paths: The task files.
        cache: The folder of the cache, for template banks.

    Returns:
        For each task, layer → [rows, ...], for the layers that it has changed. What else it has changed is left out.

    Raises:
        MissingInputError: If a file, or the template bank that it needs, is not there.
        UserError: If a task belongs to other weights, or has changed no weight.
    """
    found: list[dict[str, Tensor]] = []
    for path in paths:
        with section("recast.tasks: "):
            changes = changes_of(network, load_task(path), cache).layers
        if not changes:
            raise UserError(
                f"recast.tasks: expected tasks that have changed weights, got {path}, which has changed none: it has "
                "neither coefficients nor an adapter that becomes part of the weights"
            )
        found.append(changes)
    return found


def weighted_layers(network: nn.Module) -> list[str]:
    """The names of the Linear and Conv2d layers of a network, in its order."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
