"""What a sequence is set next to: a model for each task, one fine-tuned task after task, one for all classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file

from recast_exp.config.schema import Config, with_values
from recast_exp.experiment import subruns
from recast_exp.experiment.adaptation import adapt
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.sequence_tasks import SequenceTask, together
from recast_exp.experiment.unknown_task import score
from recast_exp.files import replacing
from recast_exp.heads import Solution
from recast_exp.models.features import head_of
from recast_exp.models.loading import load_task, restore
from recast_exp.runs import layout
from recast_exp.runs.results import Results, SequenceRow
from recast_exp.training.features import extract

SEPARATE, FINE_TUNING, JOINT = "full fine-tuning, a model each", "full fine-tuning in sequence", "all classes at once"


def separate(run_dir: Path, group: str | None, tasks: Sequence[SequenceTask]) -> SequenceRow:
    """Full fine-tuning of a backbone of its own for each task: nothing is forgotten, and nothing shared."""
    results = []
    for number, task in enumerate(tasks):
        folder = layout.sequenced(run_dir, number, task.name, "separate")
        results.append(_run(_full(task.settings), folder, SEPARATE, group))
    known = [float(each.metrics["test/accuracy"]) for each in results]
    return _row(SEPARATE, fmean(known), 0.0, None, results)


def fine_tuning(
    run_dir: Path, group: str | None, tasks: Sequence[SequenceTask], parts: Sequence[Experiment]
) -> SequenceRow:
    """Full fine-tuning of one backbone on one task after another; each keeps the head that it had."""
    results, solutions, matrix, unknown = [], [], [], 0.0
    weights: Path | None = None
    for number, task in enumerate(tasks):
        folder = layout.sequenced(run_dir, number, task.name, "fine-tuning")
        settings = _full(task.settings)
        if weights is not None:
            settings = with_values(settings, {"model.weights": str(weights)})
        results.append(_run(settings, folder, FINE_TUNING, group))
        weights = folder / layout.WEIGHTS
        _write_weights(folder / layout.TASK, weights)
        network = copy.deepcopy(parts[number].backbone.network)
        # Not `restore`: after the first task, its file belongs to the weights of the task before
        network.load_state_dict(load_file(weights), strict=False)
        head = load_file(folder / layout.TASK)
        solutions.append(_head(head))
        logits, labels = [], []
        for earlier in parts[: number + 1]:
            features = extract(earlier.recipe, network, earlier.data(keep=True, plain=True), "test")
            logits.append(torch.cat([solution.logits(features.values) for solution in solutions], 1))
            labels.append(features.labels)
        found = score(logits, labels, [len(part.images.classes) for part in parts[: number + 1]])
        matrix.append(found.per_task)
        unknown = found.unknown
    row = _row(FINE_TUNING, fmean(matrix[-1]), forgetting(matrix), unknown, results)
    return {**row, "parameters": results[0].parameters["task_specific"]}  # one backbone serves all tasks


def joint(
    run_dir: Path, group: str | None, tasks: Sequence[SequenceTask], parts: Sequence[Experiment]
) -> SequenceRow | None:
    """The method itself, trained once on the classes of all tasks; None where they are not parts of one dataset."""
    settings = together(tasks)
    if settings is None:
        return None
    folder = run_dir / layout.TASKS / "joint"
    results = _run(settings, folder, JOINT, group)
    network = copy.deepcopy(parts[0].backbone.network)
    task = load_task(folder / layout.TASK)
    restore(network, task, cache=parts[0].cache)
    solution = head_of(network.eval())
    order = [task.classes.index(name) for part in parts for name in part.images.classes]
    solution = Solution(solution.weight[order], solution.bias[order])
    logits, labels = [], []
    for part in parts:
        features = extract(part.recipe, network, part.data(keep=True, plain=True), "test")
        logits.append(solution.logits(features.values))
        labels.append(features.labels)
    found = score(logits, labels, [len(part.images.classes) for part in parts])
    return _row(JOINT, found.known, 0.0, found.unknown, [results])


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean over all tasks but the last of their best accuracy before the last task minus that after it.

    Source: Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning" (arXiv 1801.10112), equation 3.

    Args:
        matrix: Row i has the accuracies of the tasks 0 to i after task i.
    """
    last = matrix[-1]
    lost = [max(row[task] for row in matrix[task:-1]) - last[task] for task in range(len(last) - 1)]
    return fmean(lost) if lost else 0.0


def _full(settings: Config) -> Config:
    backbone_lr = 1e-4 if settings.optimizer.backbone_lr is None else settings.optimizer.backbone_lr
    return with_values(
        settings,
        {
            "model.method": "full",
            "model.batchnorm_statistics": "update",
            "adapter": {"name": "none"},
            "optimizer.backbone_lr": backbone_lr,
            "probe": False,
        },
    )


def _run(settings: Config, folder: Path, label: str, group: str | None) -> Results:
    settings = with_values(settings, {"label": label})
    return subruns.done(settings, folder, label, lambda: adapt(settings, folder, group))


def _row(method: str, known: float, lost: float, unknown: float | None, results: Sequence[Results]) -> SequenceRow:
    return {
        "method": method,
        "known": known,
        "forgetting": lost,
        "unknown": unknown,
        "parameters": sum(each.parameters["task_specific"] for each in results),
        "heads": sum(each.parameters["head"] for each in results),
    }


def _write_weights(task: Path, weights: Path) -> None:
    """The backbone of a fully fine-tuned task, as a file of weights that the next one starts from."""
    if not weights.is_file():
        tensors = load_file(task)
        kept = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(("backbone/", "buffers/"))}
        with replacing(weights) as temporary:
            save_file(kept, temporary)


def _head(tensors: dict[str, torch.Tensor]) -> Solution:
    (weight,) = [tensor for name, tensor in tensors.items() if name.startswith("head/") and tensor.ndim == 2]
    (bias,) = [tensor for name, tensor in tensors.items() if name.startswith("head/") and tensor.ndim == 1]
    return Solution(weight.double(), bias.double())
