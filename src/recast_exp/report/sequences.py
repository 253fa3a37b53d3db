"""The sequences of tasks below a folder: what each method has after the last task, and the matrix of accuracies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from recast_exp.report.charts import Figure, Figures, figure_of, safe
from recast_exp.report.reading import DamagedError, read_json, records
from recast_exp.runs.layout import SEQUENCE
from recast_exp.runs.results import Sequenced

COLUMNS = ("method", "task known", "forgetting", "task unknown", "parameters")


@dataclasses.dataclass(frozen=True)
class TaskSequence:
    """A sequence of `stage=sequence`.

    Attributes:
        folder: Where it is, relative to the folder of the report.
        found: Its `sequence.json`.
    """

    folder: str
    found: Sequenced

    @property
    def title(self) -> str:
        """Its method, and where it is."""
        place = "" if self.folder == "." else f", {self.folder}"
        return f"{self.found['methods'][0]['method']} on {len(self.found['tasks'])} tasks in sequence{place}"

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """A row for each method, as `COLUMNS` names them; accuracies in percent."""
        return [
            (
                row["method"],
                f"{100 * row['known']:.1f}",
                f"{100 * row['forgetting']:.1f}",
                "–" if row["unknown"] is None else f"{100 * row['unknown']:.1f}",
                f"{row['parameters']:,}",
            )
            for row in self.found["methods"]
        ]


def read_sequences(folder: Path) -> tuple[list[TaskSequence], list[str]]:
    """The sequences below a folder, and a remark on each that cannot be read."""
    sequences, remarks = [], []
    for path in records(folder, SEQUENCE):
        place = path.parent.relative_to(folder).as_posix()
        try:
            sequence = TaskSequence(place, read_json(path, Sequenced))
            _ = sequence.rows, sequence.title, sequence_figures([sequence])
        except (DamagedError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            remarks.append(f"{place}: {path.name} cannot be read ({type(error).__name__}); it is not shown")
        else:
            sequences.append(sequence)
    return sequences, remarks


def sequence_figures(sequences: Sequence[TaskSequence]) -> Figures:
    """For each sequence, the accuracies of all tasks after each; and the accuracies with the task unknown."""
    figures: Figures = {}
    for sequence in sequences:
        figures[f"{sequence.title}|each task after each"] = _heat_map(sequence.found)
        if sequence.found["unknown"]:
            figures[f"{sequence.title}|task unknown"] = _curves(sequence.found)
    return figures


def _heat_map(found: Sequenced) -> Figure:
    names, count = [safe(task) for task in found["tasks"]], len(found["tasks"])
    rows = [[round(100 * value, 2) for value in row] + [None] * (count - len(row)) for row in found["accuracy"]]
    data: list[dict[str, object]] = [
        {
            "type": "heatmap",
            "z": rows,
            "x": names,
            "y": names,
            "colorscale": "Blues",
            "reversescale": True,
            "texttemplate": "%{z:.1f}",
            "hovertemplate": "after %{y}<br>%{x}: %{z:.1f} %<extra></extra>",
            "colorbar": {"thickness": 12},
        }
    ]
    return figure_of(
        data,
        xaxis={"title": {"text": "test accuracy in percent of"}, "type": "category", "showgrid": False},
        yaxis={"title": {"text": "after"}, "type": "category", "autorange": "reversed", "automargin": True},
        height=140 + 40 * count,
    )


def _curves(found: Sequenced) -> Figure:
    data: list[dict[str, object]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(method),
            "x": list(range(1, len(curve) + 1)),
            "y": [round(100 * value, 2) for value in curve],
            "hovertemplate": f"{safe(method)}<br>%{{x}} tasks: %{{y:.1f}} %<extra></extra>",
        }
        for method, curve in found["unknown"].items()
    ]
    return figure_of(
        data,
        xaxis={"title": {"text": "tasks so far"}, "dtick": 1},
        yaxis={"title": {"text": "test accuracy in percent, task unknown"}},
        showlegend=True,
    )
