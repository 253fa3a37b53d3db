"""The charts of a report, as the plain data that plotly's script in the page draws.

Building them from plotly's Python objects would take seconds for a large sweep; the tests do so, to validate them.
Text and grid have no colours here: the page has two themes.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from recast_exp.errors import RecastError, one_line
from recast_exp.plugins import TEMPLATES
from recast_exp.report import text
from recast_exp.report.reading import DamagedError, Job, read_history
from recast_exp.report.replicates import Words
from recast_exp.report.table import Average, Cell, Results, Row
from recast_exp.report.trials import Search, Trial, numbers
from recast_exp.runs import layout
from recast_exp.runs.state import State
from recast_exp.runs.task_header import read_record

POINTS = 200  # at most so many points on a curve
COLORS = (
    *("#3b82c4", "#e07b39", "#2f9e6e", "#c94f7c", "#8a6fc9", "#b0892c", "#3aa6b9", "#d1495b", "#6b8e23", "#a15c38"),
    *("#5c7fa3", "#c76ad0"),
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "hexagon", "cross", "triangle-down", "pentagon")
DASHES = ("solid", "dash", "dot", "dashdot")
CURVES = {"val/accuracy": "validation accuracy", "val/loss": "validation loss", "train/loss": "training loss"}


class Figure(TypedDict):
    """A figure as JSON, as plotly's script takes it."""

    data: list[dict[str, object]]
    layout: dict[str, object]


Figures = dict[str, Figure]
"""Key → a figure; a key is the two choices above the chart, joined by a bar."""


def style(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """A colour, a symbol and a dash for each method, the same in all charts."""
    return {
        method: {
            "color": COLORS[at % len(COLORS)],
            "symbol": SYMBOLS[at % len(SYMBOLS)],
            "dash": DASHES[(at // len(COLORS)) % len(DASHES)],
        }
        for at, method in enumerate(methods)
    }


def accuracy_figures(results: Results, styles: Mapping[str, Mapping[str, str]]) -> Figures:
    """Accuracy against the size of a task: for the average and for each dataset, in parameters and in bytes."""
    columns: dict[str, dict[str, Cell | Average]] = {
        name: {row.method: row.cells[name] for row in results.rows} for name in results.datasets
    }
    if len(results.datasets) > 1:
        columns = {"average": {row.method: row.average for row in results.rows}, **columns}
    return {
        f"{name}|{unit}": _accuracy(results.rows, column, unit, styles)
        for name, column in columns.items()
        for unit in ("parameters", "bytes")
    }


def _accuracy(
    rows: Sequence[Row], column: Mapping[str, Cell | Average], unit: str, styles: Mapping[str, Mapping[str, str]]
) -> Figure:
    sizes = {row.method: (row.parameters if unit == "parameters" else row.size) for row in rows}
    counts = [size[1] for size in sizes.values() if size and size[1]]
    ends = [min(counts, default=1) / 2, max(counts, default=1) * 2]
    data: list[dict[str, object]] = []
    for row in rows:
        cell, size, look = column[row.method], sizes[row.method], styles[row.method]
        if cell.mean is None or size is None:
            continue
        label = f"{safe(row.method)}<br>{text.measured(cell)} %<br>{text.count(size)} {unit}<extra></extra>"
        accuracy, spread = 100 * cell.mean, 100 * (cell.std or 0)
        if not size[1]:  # only the head is trained: a line, as a logarithmic axis cannot show 0 parameters
            line = {"color": look["color"], "dash": "dash", "width": 2}
            data.append(_trace(row.method, ends, [accuracy] * 2, label, mode="lines", line=line))
            continue
        marker = {
            "color": look["color"],
            "symbol": look["symbol"] + ("-open" if cell.note else ""),
            "size": 12,
            "line": {"width": 2, "color": look["color"]},
        }
        bar = {"error_y": {"type": "data", "array": [spread], "thickness": 1.2, "width": 4}} if spread else {}
        data.append(_trace(row.method, [size[1]], [accuracy], label, mode="markers", marker=marker, **bar))
    axis: dict[str, object] = {"type": "log", "title": {"text": f"{unit} of a task, without the head"}}
    if ends[1] >= 100 * ends[0]:
        axis["dtick"] = 1  # powers of ten only
    return figure_of(data, xaxis=axis, yaxis={"title": {"text": "test accuracy in percent"}})


def curve_figures(results: Results, styles: Mapping[str, Mapping[str, str]]) -> tuple[Figures, list[str]]:
    """Learning curves for each dataset: the mean over a method's replicates, for as many epochs as all of them have.

    Returns:
        The figures, and a remark on each file that cannot be read.
    """
    histories: dict[tuple[str, str], list[list[dict[str, float]]]] = defaultdict(list)
    remarks = []
    for (method, dataset, _), job in results.counted.items():
        try:
            if history := read_history(job):
                histories[dataset, method].append(history)
        except DamagedError as error:
            remarks.append(f"{job.folder}: {error}; its learning curve is not shown")
    figures = {}
    for dataset in results.datasets:
        by_method = {
            row.method: histories[dataset, row.method] for row in results.rows if (dataset, row.method) in histories
        }
        for name, title in CURVES.items():
            data = [
                _curve(method, runs, name, styles[method], results.words)
                for method, runs in by_method.items()
                if all(name in row for history in runs for row in history)
            ]
            if data:
                unit = " in percent" if name.endswith("accuracy") else ""
                few = max(len(history) for runs in by_method.values() for history in runs) <= 12
                epochs = {"title": {"text": "epoch"}, **({"dtick": 1} if few else {})}
                axes = {"xaxis": epochs, "yaxis": {"title": {"text": title + unit}}}
                figures[f"{dataset}|{title}"] = figure_of(data, **axes)
    return figures, remarks


def _curve(
    method: str, runs: list[list[dict[str, float]]], name: str, look: Mapping[str, str], words: Words
) -> dict[str, object]:
    epochs = min(map(len, runs))
    scale = 100 if name.endswith("accuracy") else 1
    values = scale * np.array([[row[name] for row in history[:epochs]] for history in runs]).mean(0)
    shown = np.unique(np.linspace(0, epochs - 1, min(epochs, POINTS)).round().astype(int))
    averaged = f"mean of {len(runs)} {words.many}" if len(runs) > 1 else f"1 {words.one}"
    return _trace(
        method,
        [runs[0][at].get("epoch", at + 1) for at in shown],
        [_number(values[at]) for at in shown],
        f"{safe(method)} ({averaged})<br>epoch %{{x}}: %{{y:.4g}}<extra></extra>",
        mode="lines" if epochs > 1 else "markers",
        line={"color": look["color"], "dash": look["dash"], "width": 2},
        marker={"color": look["color"]},
    )


def search_figures(searches: Sequence[Search]) -> Figures:
    """Validation accuracy of a search's trials: over the trials, and against each key that is searched."""
    return {
        f"{search.title}|{against}": _trials(search, against)
        for search in searches
        for against in ("trial", *search.space)
        if any(trial.accuracy is not None for trial in search.trials)
    }


def _trials(search: Search, against: str) -> Figure:
    shown = [
        trial
        for trial in search.trials
        if trial.accuracy is not None and (against == "trial" or against in trial.parameters)
    ]
    at: Sequence[object] = [trial.number for trial in shown]
    axis: dict[str, object] = {"title": {"text": "trial"}, **({"dtick": 1} if len(search.trials) <= 20 else {})}
    if against != "trial":
        sampled = [trial.parameters[against] for trial in shown]
        values = numbers(sampled)
        at = values or [safe(value) for value in sampled]
        logarithmic = values is not None and search.space[against].startswith("tag(log")
        axis = {
            "title": {"text": safe(against)},
            "type": "category" if values is None else "log" if logarithmic else "linear",
        }
    accuracies = [100 * (trial.accuracy or 0) for trial in shown]
    best = [trial.number == search.best for trial in shown]
    finished = [trial.state == State.FINISHED for trial in shown]
    symbols = [
        "star" if is_best else "circle" if is_finished else "circle-open"
        for is_best, is_finished in zip(best, finished, strict=True)
    ]
    colors = [COLORS[1] if is_best else COLORS[0] for is_best in best]
    data: list[dict[str, object]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": list(at),
            "y": accuracies,
            "text": [_sampled(trial) for trial in shown],
            "hovertemplate": "%{text}<br>%{y:.1f} %<extra></extra>",
            "marker": {
                "symbol": symbols,
                "size": [16 if is_best else 10 for is_best in best],
                "color": colors,
                "line": {"width": 2, "color": colors},
            },
        }
    ]
    if against == "trial" and any(finished):
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [number for number, is_finished in zip(at, finished, strict=True) if is_finished],
                "y": list(itertools.accumulate((a for a, f in zip(accuracies, finished, strict=True) if f), max)),
                "line": {"color": COLORS[1], "width": 1.5, "shape": "hv"},
                "hoverinfo": "skip",
            }
        )
    return figure_of(data, xaxis=axis, yaxis={"title": {"text": "validation accuracy in percent"}})


def _sampled(trial: Trial) -> str:
    sampled = (f"{key}={text.sampled(value)}" for key, value in trial.parameters.items())
    return "<br>".join([f"trial {trial.number}, {trial.state}", *map(safe, sampled)])


def coefficient_figures(results: Results) -> tuple[Figures, list[str]]:
    """What each method has made of each layer, a heat map for each dataset: of the first replicate that says so.

    With several datasets, there is a second figure: the differences from the mean over the datasets.

    Returns:
        The figures, and a remark on each file that cannot be read.
    """
    trained: dict[str, dict[str, Table]] = defaultdict(dict)
    remarks = []
    for (method, dataset, _), job in results.counted.items():
        if dataset in trained[method] or not job.parameters.get("coefficients"):
            continue
        try:
            table = _relative_form(job)
            if table is not None:
                trained[method][dataset] = table
        except DamagedError as error:
            remarks.append(f"{job.folder}: {error}; its coefficients are not shown")
    figures = {}
    for method, tables in trained.items():
        if not tables:
            continue
        figures[f"{method}|change by training"] = _heat_maps(tables)
        layouts = {tuple((layer, *columns) for layer, (columns, _) in table.items()) for table in tables.values()}
        if len(tables) > 1 and len(layouts) == 1:
            layers = next(iter(tables.values()))
            mean = {layer: np.mean([table[layer][1] for table in tables.values()], axis=0) for layer in layers}
            apart = {
                name: {layer: (columns, values - mean[layer]) for layer, (columns, values) in table.items()}
                for name, table in tables.items()
            }
            figures[f"{method}|difference from the mean over the datasets"] = _heat_maps(apart)
    return figures, remarks


Table = dict[str, tuple[list[str], npt.NDArray[np.float64]]]
"""Layer → what each value is of, and the values: A minus the identity (`recast.formulas.relative`), its own first."""


def _relative_form(job: Job) -> Table | None:
    """The relative form of the coefficients of a task file, layer by layer; None for templates that have none."""
    path = job.path / layout.TASK
    try:
        templates = read_record(path).get("templates")
        if templates is not None and templates["solver"] in TEMPLATES.names():
            return None
        with safe_open(path, framework="np") as file:
            values = file.get_tensor("relative").astype(np.float64) if "relative" in file.keys() else None  # noqa: SIM118
        table: Table = {}
        if templates is None or values is None:
            raise ValueError("of an earlier version, which wrote no relative form")
        for _, _, blocks, *layers in templates["groups"]:
            part, values = np.split(values, [len(layers) * blocks * len(layers)])
            shares = part.reshape(len(layers), blocks, len(layers))
            for own, layer in enumerate(layers):
                order = [own, *(other for other in range(len(layers)) if other != own)]
                change = shares[own] - np.eye(len(layers))[own]
                names = ["itself", *(f"share of {layers[other]}" for other in order[1:])]
                columns = [
                    f"block {block + 1}, {name}" if blocks > 1 else name for name in names for block in range(blocks)
                ]
                table[layer] = columns, change[:, order].T.ravel()
    except (RecastError, SafetensorError, OSError, ValueError, TypeError) as error:
        raise DamagedError(f"{path.name} cannot be read ({one_line(error, limit=120)})") from error
    return table


def _heat_maps(tables: Mapping[str, Table]) -> Figure:
    """A heat map for each dataset side by side, with one scale: a row is a layer."""
    layers = next(iter(tables.values()))
    limit = max(float(np.abs(values).max()) for table in tables.values() for _, values in table.values()) or 1.0
    width = max(len(values) for table in tables.values() for _, values in table.values())
    data: list[dict[str, object]] = []
    axes: dict[str, object] = {}
    for at, (name, table) in enumerate(tables.items()):
        pad = {layer: [None] * (width - len(values)) for layer, (_, values) in table.items()}
        data.append(
            {
                "type": "heatmap",
                "z": [[*map(_number, values), *pad[layer]] for layer, (_, values) in table.items()],
                "text": [[*columns, *pad[layer]] for layer, (columns, _) in table.items()],
                "x": [f"{column + 1}" for column in range(width)],
                "y": list(table),
                "xaxis": f"x{at + 1 if at else ''}",
                "zmin": -limit,
                "zmax": limit,
                "colorscale": [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]],
                "showscale": at == len(tables) - 1,
                "colorbar": {"thickness": 12},
                "hovertemplate": f"{safe(name)}<br>%{{y}}, %{{text}}: %{{z:+.4f}}<extra></extra>",
            }
        )
        axes[f"xaxis{at + 1 if at else ''}"] = {
            "title": {"text": safe(name)},
            "domain": [at / len(tables), (at + 0.94) / len(tables)],
            "showticklabels": False,
            "showgrid": False,
            "type": "category",
        }
    return figure_of(
        data,
        **axes,
        yaxis={"autorange": "reversed", "tickfont": {"size": 10}, "showgrid": False},
        height=110 + 20 * len(layers),
        margin={"l": 10, "r": 10, "t": 10, "b": 50},
    )


_LAYOUT: dict[str, object] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "showlegend": False,
    "hovermode": "closest",
    "dragmode": False,
    "height": 420,
    "margin": {"l": 60, "r": 16, "t": 16, "b": 56},
}


def figure_of(data: list[dict[str, object]], **layout: object) -> Figure:
    """A figure with the look of all charts."""
    return {"data": data, "layout": _LAYOUT | layout}


def _trace(method: str, x: Sequence[float], y: Sequence[float | None], label: str, **look: object) -> dict[str, object]:
    """The points of one method, which the page's legend finds by `meta`."""
    return {"type": "scatter", "x": list(x), "y": list(y), "meta": method, "hovertemplate": label, **look}


def safe(name: str) -> str:
    """A name escaped for plotly, which gives a meaning to a few tags and placeholders."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def _number(value: float) -> float | None:
    """Six significant digits, more than a screen shows; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
