"""Learning, accumulation, ensemble: one set of task parameters for all tasks of a sequence (LAE).

Gao et al., ICCV 2023, arXiv 2303.10070: online parameters learn each task from where the one before has left them,
offline parameters accumulate them, and both predict together: of each class, the larger probability counts. They
accumulate with a momentum in each step; here the offline parameters are the mean of the online ones after each task.
Each task keeps the head that it was trained with. Parameters do not grow with the tasks, and tasks can be forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from recast_exp.experiment import subruns
from recast_exp.experiment.adaptation import adapt
from recast_exp.experiment.baselines import forgetting
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.sequence_tasks import SequenceTask
from recast_exp.experiment.unknown_task import score
from recast_exp.heads import Solution
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.features import head_of
from recast_exp.models.loading import load_task, restore
from recast_exp.runs import layout
from recast_exp.runs.results import Results, SequenceRow
from recast_exp.training.features import extract

LAE = "LAE"


def accumulated(
    run_dir: Path, group: str | None, tasks: Sequence[SequenceTask], parts: Sequence[Experiment], label: str
) -> SequenceRow:
    """Train the tasks one after another on the same parameters, and test all earlier ones after each.

    Args:
        run_dir: Folder of the sequence.
        group: Folder of the sweep that it belongs to.
        tasks: The tasks.
        parts: Their experiments, on one backbone.
        label: What the method is called.
    """
    title = f"{label}, {LAE}"
    online: dict[str, Tensor] = {}
    offline: dict[str, Tensor] = {}
    solutions: list[Solution] = []
    results: list[Results] = []
    matrix: list[list[float]] = []
    unknown = 0.0
    for number, (task, part) in enumerate(zip(tasks, parts, strict=True)):
        folder = layout.sequenced(run_dir, number, task.name, "lae")
        begin = dict(online)

        def work(task: SequenceTask = task, folder: Path = folder, begin: dict[str, Tensor] = begin) -> object:
            return adapt(task.settings, folder, group, begin=begin)

        results.append(subruns.done(task.settings, folder, title, work))
        adapted = restore(copy.deepcopy(part.backbone.network), load_task(folder / layout.TASK), cache=part.cache)
        online = shared_tensors(adapted)
        offline = {
            name: tensor if not number else (number * offline[name] + tensor) / (number + 1)
            for name, tensor in online.items()
        }
        adapted.network.eval()
        solutions.append(head_of(adapted.network))
        row, unknown = _tested(adapted, (online, offline), solutions, parts[: number + 1])
        matrix.append(row)
    first = results[0].parameters
    return {
        "method": title,
        "known": fmean(matrix[-1]),
        "forgetting": forgetting(matrix),
        "unknown": unknown,
        "parameters": 2 * first["task_specific"],
        "heads": sum(each.parameters["head"] for each in results),
    }


def shared_tensors(adapted: AdaptedModel) -> dict[str, Tensor]:
    """`kind/public name` → a copy of what all tasks share: coefficients and adapter."""
    kinds = ("coefficients/", "adapter/")
    return {name: tensor.clone() for name, tensor in adapted.task_tensors().items() if name.startswith(kinds)}


@torch.no_grad()
def _tested(
    adapted: AdaptedModel,
    parameters: Sequence[Mapping[str, Tensor]],
    solutions: Sequence[Solution],
    parts: Sequence[Experiment],
) -> tuple[list[float], float]:
    """The accuracy of each task with its classes, and the mean over the tasks with the classes of all.

    Of each class, the larger of two probabilities counts. Their logarithms have the same order, and do not underflow
    where a head's logits are large.
    """
    sizes = [len(part.images.classes) for part in parts]
    labels: list[Tensor] = []
    over_own: list[Tensor] = []
    over_all: list[Tensor] = []
    for number, part in enumerate(parts):
        of_own, of_all = [], []
        for own in parameters:
            for name, tensor in adapted.task_tensors().items():
                if name in own:
                    tensor.copy_(own[name])
            features = extract(part.recipe, adapted.network, part.data(keep=True, plain=True), "test")
            logits = [solution.logits(features.values) for solution in solutions]
            of_own.append(logits[number].log_softmax(1))
            of_all.append(torch.cat(logits, 1).log_softmax(1))
        labels.append(features.labels)
        over_own.append(torch.stack(of_own).amax(0))
        over_all.append(torch.stack(of_all).amax(0))
    known = [(own.argmax(1) == label).double().mean().item() for own, label in zip(over_own, labels, strict=True)]
    return known, score(over_all, labels, sizes).unknown
