"""Several tasks as one set of templates: merged reversibly, with a few coefficients for each task.

What S tasks have changed in the weight of a layer, ΔW[1] … ΔW[S], is rewritten as combinations of k ≤ S templates, by
the closed form of Neural Mimicry with tasks in the place of layers. With k = S, each task comes back exactly; with
fewer, tasks share what they can, and the error says how much they are in each other's way. As in Reversible Model
Merging (Alipour and Amiri, 2025, arXiv 2510.14163), the merged whole is a small basis instead of one set of averaged
weights.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recast_exp.adapters import NoAdapter
from recast_exp.errors import UserError, check_integer
from recast_exp.files import cache_folder, user_path, writing
from recast_exp.models.adapted import AdaptedModel, assemble
from recast_exp.models.loading import Task, check_timm, load_task
from recast_exp.models.timm_model import timm_model
from recast_exp.models.weights import fingerprint
from recast_exp.recast import Banks, Group, Origin
from recast_exp.recast.solvers import closed_form
from recast_exp.recast.weights import weights_hash
from recast_exp.tasks import library
from recast_exp.tasks.differences import Changes, changes_of, weighted_layers


@dataclass(frozen=True, eq=False)
class MergedTasks:
    """Tasks that share templates, and how far each is from what it was.

    Attributes:
        banks: The templates [k, rows, ...] of each layer, which are added to the pretrained weight.
        names: The tasks.
        coefficients: For each task, layer → [1, 1, k].
        errors: For each task, ‖ΔW - its combination‖ / ‖ΔW‖ over all layers.
        averaged: For each task, the same for the mean of all tasks in the place of its combination.
        similarity: [S, S], cosine similarity of the tasks' changes over all layers.
    """

    banks: Banks
    names: tuple[str, ...]
    coefficients: list[dict[str, Tensor]]
    errors: list[float]
    averaged: list[float]
    similarity: Tensor
    _tasks: list[Task]
    _heads: list[dict[str, Tensor]]
    _network: nn.Module

    def save(self, folder: str | Path) -> list[Path]:
        """Write a task file for each task, and the templates that they share next to them.

        `apply_task`, `load_task` and the command line take them as any task file.

        Args:
            folder: The folder; it is made.

        Returns:
            The task files, `NAME.safetensors`.

        Raises:
            UserError: If one of them would replace a task file that was merged, or the folder cannot be written to.
        """
        folder = user_path(folder)
        paths = [folder / f"{name}.safetensors" for name in _file_names(self.names)]
        sources = {task.path.resolve() for task in self._tasks}
        if replaced := [path for path in paths if path.resolve() in sources]:
            raise UserError(
                f"folder: expected another one than that of the task files that were merged, got {folder}, where "
                f"{replaced[0].name} would be replaced"
            )
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        weights = fingerprint(self._network)
        for path, task, head, own in zip(paths, self._tasks, self._heads, self.coefficients, strict=True):
            adapted = self._adapted(task, head, own)
            settings = dataclasses.replace(task.settings, backbone=task.backbone)
            more = library.computation_of(self._network, settings)
            if task.metrics and max(self.errors) < 1e-5:
                more["metrics"] = task.metrics
            library.write(path, adapted, settings, task.classes, task.input, weights, more)
        return paths

    @torch.no_grad()
    def _adapted(self, task: Task, head: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> AdaptedModel:
        settings = dataclasses.replace(task.settings, method="recast", batchnorm_statistics="frozen")
        network = copy.deepcopy(self._network)
        adapted = assemble(network, settings, NoAdapter(), self.banks, len(task.classes), task.seed)
        for layer, parameter in adapted.parameters("coefficients"):
            parameter.copy_(own[layer])
        for name, parameter in adapted.parameters("head"):
            parameter.copy_(head[name])
        return adapted


@torch.no_grad()
def merge_tasks(
    model: nn.Module, tasks: Sequence[str | Path | Task], *, rank: int | None = None, cache: str | Path | None = None
) -> MergedTasks:
    """Merge the task files of one backbone, so that each can be had again.

    Args:
        model: The plain timm model with the pretrained weights; it is not changed.
        tasks: At least two tasks, or their files, each once.
        rank: Number k of templates of each layer; None is the number of tasks, with which each comes back exactly.
        cache: The folder of the cache, for template banks; None is that of the user.

    Raises:
        MissingInputError: If a file, or the template bank that it needs, is not there.
        UserError: If there are fewer than two files, one belongs to other weights, or one has changed more than the
            weights of linear layers and convolutions.

    Example:
        >>> import timm
        >>> from recast_exp import merge_tasks
        >>> model = timm.create_model("vit_small_patch16_224", pretrained=True)  # doctest: +SKIP
        >>> merged = merge_tasks(model, ["birds.safetensors", "pets.safetensors"], rank=1)  # doctest: +SKIP
        >>> merged.errors  # doctest: +SKIP
    """
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise UserError(f"tasks: expected a list of task files, got {tasks!r:.60}")
    if len(tasks) < 2:
        raise UserError(f"tasks: expected at least two task files, got {len(tasks)}")
    if rank is not None:
        check_integer("rank", rank, 1, len(tasks) + 1)
    network, files, found_of = _read(model, tasks, cache)
    changes = [each.layers for each in found_of]
    layers = [name for name in weighted_layers(network) if any(name in change for change in changes)]
    templates: dict[str, Tensor] = {}
    coefficients: list[dict[str, Tensor]] = [{} for _ in files]
    number = len(files) if rank is None else rank
    for layer in layers:
        zeros = torch.zeros(network.get_parameter(f"{layer}.weight").shape)
        stacked = torch.stack([change.get(layer, zeros) for change in changes])
        found = closed_form.solve(stacked, number, 1, 1, seed=0)
        templates[layer] = found.templates
        for own, row in zip(coefficients, found.coefficients.unbind(0), strict=True):
            own[layer] = row
    groups = tuple(Group(layer, (layer,), number, 1) for layer in layers)
    start = {layer: torch.zeros(1, 1, number) for layer in layers}
    origin = Origin("tasks", 0, 1, {}, weights_hash(network, layers))
    banks = Banks(groups, templates, start, {"tasks": [task.path.name for task in files]}, origin, added=True)
    errors, averaged, similarity = _interference(changes, templates, coefficients)
    return MergedTasks(
        banks,
        names_of([task.path for task in files]),
        coefficients,
        errors,
        averaged,
        similarity,
        files,
        [each.head for each in found_of],
        network,
    )


def check_tasks(model: nn.Module, tasks: Sequence[str | Path | Task], cache: str | Path | None = None) -> None:
    """Refuse task files that `merge_tasks` would refuse, as it does."""
    _read(model, tasks, cache)


def _read(
    model: nn.Module, tasks: Sequence[str | Path | Task], cache: str | Path | None
) -> tuple[nn.Module, list[Task], list[Changes]]:
    """The backbone without a classifier, the tasks, and what each has changed in it."""
    check_timm(model)
    network = copy.deepcopy(model).eval().requires_grad_(False)
    timm_model(network).reset_classifier(0)
    files = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    if len({task.path.resolve() for task in files}) < len(files):
        raise UserError(f"tasks: expected each task file once, got {', '.join(str(task.path) for task in files)}")
    folder = cache_folder(None) if cache is None else user_path(cache)
    return network, files, [_changes(network, task, folder) for task in files]


def _changes(network: nn.Module, task: Task, cache: Path) -> Changes:
    """What a task has changed, if that is weights alone."""
    found = changes_of(network, task, cache)
    if found.others:
        raise UserError(
            f"tasks: expected tasks that have changed weights of linear layers and convolutions alone, got {task.path} "
            f"with {found.others[0]}, too"
        )
    if not found.layers:
        raise UserError(f"tasks: expected tasks that have changed weights, got {task.path}, which has changed none")
    return found


def _interference(
    changes: Sequence[Mapping[str, Tensor]],
    templates: Mapping[str, Tensor],
    coefficients: Sequence[Mapping[str, Tensor]],
) -> tuple[list[float], list[float], Tensor]:
    count = len(changes)
    gram = torch.zeros(count, count, dtype=torch.float64)
    left = torch.zeros(count, dtype=torch.float64)
    for layer, bank in templates.items():
        rows = [change.get(layer, torch.zeros_like(bank[0])).double().flatten() for change in changes]
        stacked = torch.stack(rows)
        gram += stacked @ stacked.T
        for number, own in enumerate(coefficients):
            combined = torch.tensordot(own[layer][0, 0].double(), bank.double(), 1).flatten()
            left[number] += (combined - rows[number]).square().sum()
    norms = gram.diagonal().sqrt()
    mean = gram.mean(1)
    apart = (gram.diagonal() - 2 * mean + gram.mean()).clamp_min(0).sqrt()
    return (left.sqrt() / norms).tolist(), (apart / norms).tolist(), gram / torch.outer(norms, norms)


def _file_names(names: Sequence[str]) -> list[str]:
    """Names without slashes, numbered where they would be one."""
    plain = [name.replace("/", " ") for name in names]
    if len({name.casefold() for name in plain}) == len(plain):
        return plain
    return [f"{name} {number + 1}" for number, name in enumerate(plain)]


def names_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of paths that tell them apart, without the ending of the file."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").absolute().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{path.stem} {number + 1}" for number, path in enumerate(paths))
