"""The procedure of `stage=sequence`: one task after another on one backbone, and what is left of the earlier ones."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor

from recast_exp.config.schema import Config
from recast_exp.display import console, plots
from recast_exp.experiment import baselines, subruns
from recast_exp.experiment.accumulated import accumulated
from recast_exp.experiment.adaptation import adapt
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.sequence_tasks import SequenceTask
from recast_exp.experiment.shared_model import Shared, mean_of, opened, relative_of
from recast_exp.experiment.unknown_task import Score, UnknownTask
from recast_exp.files import write_json, write_text
from recast_exp.heads import choose
from recast_exp.heads.best import Best
from recast_exp.models.label import method_label, run_title
from recast_exp.runs import layout
from recast_exp.runs.results import Metrics, Results, Sequenced, SequenceRow
from recast_exp.training.loop import Prediction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a sequence does beyond training its tasks.

    Attributes:
        start_from: What a task's coefficients start from: "zero" for the pretrained ones, "mean" of the earlier tasks,
            or those of the earlier "task" whose features fit the new images best.
        baselines: Some of "lae", "separate", "fine-tuning" and "joint".
        random_features: Number of RanPAC's random features; None where images of unknown task are not scored.
    """

    start_from: str
    baselines: tuple[str, ...]
    random_features: int | None


def run(settings: Config, run_dir: Path, group: str | None, tasks: Sequence[SequenceTask], plan: Plan) -> Metrics:
    """Train the tasks in order, test all earlier ones after each, and set other methods next to them.

    A task is trained as `stage=adapt` trains it, in a folder of its own, and goes on from there when the same command
    is given again. The model that tests them is one: it takes each task from its file and keeps all.

    Args:
        settings: The settings of the command.
        run_dir: Folder of the sequence.
        group: Folder of the sweep that it belongs to.
        tasks: The tasks.
        plan: What else is done.

    Returns:
        Accuracies, forgetting and transfer.

    Raises:
        UserError: If the tasks have different backbones.
        RuntimeError: If a later task has changed the predictions of an earlier one, which is a bug.
    """
    parts = opened(tasks)
    alone, group = group is None, group or str(run_dir)  # trackers show its runs together
    label = method_label(settings.label, settings.model, settings.adapter)
    trained = _Trained(run_dir, group, label, plan.start_from)
    unknown = None if plan.random_features is None else UnknownTask(plan.random_features, settings.seed)
    shared, matrix = Shared.of(parts[0]), []
    curves: dict[str, list[float]] = {}
    predictions: dict[int, list[Prediction]] = {}
    for number, (task, part) in enumerate(zip(tasks, parts, strict=True)):
        trained.task(number, task, part, shared)
        shared.add(trained.paths[-1])
        row = []
        for earlier in range(number + 1):
            tested = shared.test(earlier, parts[earlier])
            if predictions.setdefault(earlier, tested.predictions) != tested.predictions:
                raise RuntimeError(f"{task.name} has changed the predictions of {tasks[earlier].name}; this is a bug")
            row.append(tested.metrics["test/accuracy"])
        matrix.append(row)
        log.info("%s", ", ".join(f"{each.name} {100 * a:.1f} %" for each, a in zip(tasks, row, strict=False)))
        scores: Mapping[str, Score] = {}
        if unknown is not None:
            unknown.add(part, shared)
            scores = unknown.scores()
            for name, value in [(label, unknown.inferred(shared)), *((n, s.unknown) for n, s in scores.items())]:
                curves.setdefault(name, []).append(value)
    own = trained.row(matrix, curves[label][-1] if label in curves else None)
    rows = [own, *_heads(scores, own, matrix), *_baselines(run_dir, group, tasks, parts, plan.baselines, label)]
    found: Sequenced = {
        "tasks": [task.name for task in tasks],
        "accuracy": matrix,
        "identical": True,  # or an error was raised
        "backward_transfer": fmean(matrix[-1][j] - matrix[j][j] for j in range(len(tasks) - 1)),
        "forward_transfer": trained.transfer(matrix),
        "methods": rows,
        "unknown": curves,
        "parameters": [each.parameters["task_specific"] for each in trained.results],
        "bytes": [path.stat().st_size for path in trained.paths],
        "seconds": [float(each.metrics["seconds"]) for each in trained.results],
    }
    _write(run_dir, found)
    if alone:  # a sweep has a table of its own
        console.show_sequence(run_title(settings.model, settings.adapter, f"{len(tasks)} tasks", settings.seed), found)
        log.info("Results: %s", run_dir)
    return _metrics(found, trained.results)


class _Trained:
    """The tasks that are trained so far."""

    def __init__(self, run_dir: Path, group: str | None, label: str, start_from: str) -> None:
        self._run_dir, self._group, self._label, self._start_from = run_dir, group, label, start_from
        self.paths: list[Path] = []
        self.results: list[Results] = []
        self._from_zero: list[float] = []

    def task(self, number: int, task: SequenceTask, part: Experiment, shared: Shared) -> None:
        """Train a task, or take what is there of it."""
        start = None
        if number and self._start_from != "zero":
            folder = layout.sequenced(self._run_dir, number, task.name, "from zero")
            self._from_zero.append(float(self._run(task, folder, None).metrics["test/accuracy"]))
            start = self._start(part, shared)
        method = "" if self._start_from == "zero" else f"from {self._start_from}"
        folder = layout.sequenced(self._run_dir, number, task.name, method)
        self.results.append(self._run(task, folder, start))
        self.paths.append(folder / layout.TASK)

    def _run(self, task: SequenceTask, folder: Path, start: Mapping[str, Tensor] | None) -> Results:
        return subruns.done(
            task.settings, folder, self._label, lambda: adapt(task.settings, folder, self._group, start)
        )

    def _start(self, part: Experiment, shared: Shared) -> Mapping[str, Tensor]:
        if self._start_from == "mean":
            return mean_of(self.paths)
        losses = []
        for earlier in range(len(self.paths)):
            train, val = (shared.features(earlier, part, split) for split in ("train", "val"))
            losses.append(choose(Best(), train, val).trial.loss)
        best = min(range(len(losses)), key=losses.__getitem__)
        log.info("%s starts from task %d, with whose features a solved head has the lowest loss", self._label, best + 1)
        return relative_of(self.paths[best])

    def row(self, matrix: Sequence[Sequence[float]], unknown: float | None) -> SequenceRow:
        """The method itself."""
        return {
            "method": self._label,
            "known": fmean(matrix[-1]),
            "forgetting": baselines.forgetting(matrix),
            "unknown": unknown,
            "parameters": sum(each.parameters["task_specific"] for each in self.results),
            "heads": sum(each.parameters["head"] for each in self.results),
        }

    def transfer(self, matrix: Sequence[Sequence[float]]) -> float | None:
        """Mean over all tasks but the first of the accuracy minus that from the pretrained start."""
        if not self._from_zero:
            return None
        return fmean(matrix[i + 1][i + 1] - alone for i, alone in enumerate(self._from_zero))


def _heads(scores: Mapping[str, Score], own: SequenceRow, matrix: Sequence[Sequence[float]]) -> list[SequenceRow]:
    """Joint heads on features that all tasks share; they forget nothing, as each is solved for all classes."""
    first = own["parameters"] // len(matrix)
    return [
        {
            "method": name,
            "known": score.known,
            "forgetting": 0.0,
            "unknown": score.unknown,
            "parameters": first if name.startswith("first session") else 0,
            "heads": own["heads"],
        }
        for name, score in scores.items()
    ]


def _baselines(
    run_dir: Path,
    group: str | None,
    tasks: Sequence[SequenceTask],
    parts: Sequence[Experiment],
    names: Sequence[str],
    label: str,
) -> list[SequenceRow]:
    rows = []
    if "lae" in names:
        rows.append(accumulated(run_dir, group, tasks, parts, label))
    if "joint" in names:
        row = baselines.joint(run_dir, group, tasks, parts)
        if row is None:
            log.warning("stage.baselines: joint is left out, as the tasks are not parts of one dataset")
        else:
            rows.append(row)
    if "separate" in names:
        rows.append(baselines.separate(run_dir, group, tasks))
    if "fine-tuning" in names:
        rows.append(baselines.fine_tuning(run_dir, group, tasks, parts))
    return rows


def _write(run_dir: Path, found: Sequenced) -> None:
    matrix = [["after", *found["tasks"]]]
    matrix += [[name, *map(str, row)] for name, row in zip(found["tasks"], found["accuracy"], strict=True)]
    write_text(run_dir / layout.SEQUENCE_MATRIX, _csv(matrix))
    names = list(found["methods"][0])
    lines = [["" if (value := dict(row)[name]) is None else str(value) for name in names] for row in found["methods"]]
    write_text(run_dir / layout.SEQUENCE_METHODS, _csv([names, *lines]))
    plots.sequence(found["tasks"], found["accuracy"], found["unknown"], layout.plot(run_dir, "sequence"))
    write_json(run_dir / layout.SEQUENCE, found)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _metrics(found: Sequenced, results: Sequence[Results]) -> Metrics:
    metrics: Metrics = {
        "test/accuracy": fmean(found["accuracy"][-1]),
        "val/accuracy": fmean(float(each.metrics["val/accuracy"]) for each in results),
        "forgetting": found["methods"][0]["forgetting"],
        "backward_transfer": found["backward_transfer"],
    }
    if found["forward_transfer"] is not None:
        metrics["forward_transfer"] = found["forward_transfer"]
    for row in found["methods"]:
        metrics[f"{row['method']}/test/accuracy"] = row["known"]
        if row["unknown"] is not None:
            metrics[f"{row['method']}/unknown_task/accuracy"] = row["unknown"]
    return metrics
