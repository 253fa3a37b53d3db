"""The plots of a run, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from recast_exp.display.figures import DISTINCT, STYLE, TRAIN, VAL, plain_powers, save_figure
from recast_exp.recast import Group
from recast_exp.runs.results import BankSize

# Matplotlib's automatic layout renders a figure several times, and every run renders the first two figures below
PLACED: Any = STYLE | {"figure.constrained_layout.use": False}


def learning_curves(history: list[dict[str, float]], path: Path, *, reported: int) -> None:
    """Loss and accuracy over the epochs, training and validation, with the reported epoch marked."""
    with mpl.rc_context(PLACED):
        figure = Figure(figsize=(8, 3.2))
        figure.subplots_adjust(0.08, 0.15, 0.98, 0.96, wspace=0.25)
        for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for part, color in (("train", TRAIN), ("val", VAL)):
                points = [(row["epoch"], row[key]) for row in history if (key := f"{part}/{name}") in row]
                label = "training" if part == "train" else "validation"
                axes.plot(*zip(*points, strict=True), color=color, marker="o" if len(points) < 3 else None, label=label)
            axes.axvline(reported, color="black", linewidth=0.8, linestyle=":", label="reported epoch")
            axes.set(xlabel="epoch", ylabel=name)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if name == "loss":
                axes.legend(frameon=False, loc="upper right")
        save_figure(figure, path)


def coefficients(relative: Mapping[str, Tensor], groups: Sequence[Group], path: Path) -> None:
    """Heat maps of what a task has made of each layer: its gain, and the shares of the other layers of its group.

    A row is a layer. Of its gain, a column is a block of the weight; of the shares, a block and another layer, in the
    order of the group.

    Args:
        relative: Layer → [B, L], its row of A (`recast.formulas.relative`).
        groups: The groups of these layers.
        path: The file.
    """
    layers = [layer for group in groups for layer in group.layers]
    parts = [shares_of(relative[layer], group.layers.index(layer)) for group in groups for layer in group.layers]
    titles, centers = ["gain of the layer itself", "shares of its group's others"], [1.0, 0.0]
    maps = [_HeatMap(title, _table([part[n] for part in parts]), centers[n]) for n, title in enumerate(titles)]
    _heat_maps([each for each in maps if each.values.shape[1]], layers, path)  # a group of one layer has no others


def added_coefficients(coefficients: Mapping[str, Tensor], path: Path) -> None:
    """A heat map of coefficients whose templates are added to the weights: how far they are from their start.

    A row is a layer, a column a coefficient of a block, after those of the block before.

    Args:
        coefficients: Layer → [K, B, n], the difference to the start.
        path: The file.
    """
    rows = [each.double().mean(0).flatten().cpu().numpy() for each in coefficients.values()]
    _heat_maps([_HeatMap("change of the coefficients", _table(rows), 0.0)], list(coefficients), path)


@dataclass(frozen=True)
class _HeatMap:
    """A table [layers, columns] with its title, and the value that is drawn white."""

    title: str
    values: npt.NDArray[np.float64]
    center: float


def _heat_maps(maps: Sequence[_HeatMap], layers: Sequence[str], path: Path) -> None:
    """Draw heat maps side by side, with the layers as their rows."""
    # In inches
    widths = [min(5.0, max(1.7, 0.28 * each.values.shape[1])) for each in maps]
    height, left, bottom, bar, room = 0.2 * len(layers), 0.3 + 0.06 * max(map(len, layers)), 0.3, 0.12, 0.85
    size = left + sum(widths) + len(maps) * (bar + room), bottom + height + 0.35

    def place(x: float, wide: float) -> tuple[float, float, float, float]:
        return x / size[0], bottom / size[1], wide / size[0], height / size[1]

    with mpl.rc_context(PLACED | {"axes.grid": False}):
        figure, x = Figure(figsize=size), left
        for width, each in zip(widths, maps, strict=True):
            limit = float(np.nanmax(np.abs(each.values - each.center))) or 1e-12
            axes = figure.add_axes(place(x, width))
            image = axes.imshow(
                each.values, cmap="RdBu_r", vmin=each.center - limit, vmax=each.center + limit, aspect="auto"
            )
            axes.set_title(each.title, fontsize=9)
            axes.set_xticks(_ticks(each.values.shape[1]) if each.values.shape[1] > 1 else [])
            axes.set_yticks(range(len(layers)), layers if each is maps[0] else [], fontsize=7)
            figure.colorbar(image, cax=figure.add_axes(place(x + width + 0.08, bar)))
            x += width + bar + room
        save_figure(figure, path)


def shares_of(row: Tensor, own: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A layer's row of A as its gain and the shares of the others.

    Args:
        row: [B, L].
        own: Place of the layer in its group.

    Returns:
        Gains [B]; shares [B · (L - 1)], of a block after that of the block before.
    """
    values = row.double().cpu().numpy()
    return values[:, own], np.delete(values, own, axis=1).ravel()


@dataclass(frozen=True)
class Compared:
    """A method of a comparison.

    Attributes:
        label: Its name in the legend.
        model: The method that trains alongside the head: `model.method` of its configuration.
        adapter: Label of its adapter; empty if it has none.
        parameters: Trained parameters of a task, without the head.
        bits: The size of these parameters in bits.
        accuracy: Mean test accuracy over the seeds, from 0 to 1.
        spread: Its standard deviation.
    """

    label: str
    model: str
    adapter: str
    parameters: int
    bits: int
    accuracy: float
    spread: float

    @property
    def stacked(self) -> bool:
        """Whether the adapter is on top of a method that trains by itself."""
        return bool(self.adapter) and self.model != "frozen"

    @property
    def colored_as(self) -> str:
        """The label that determines its colour: an adapter has the same colour on every model."""
        return self.adapter or self.label


def comparison(methods: Sequence[Compared], path: Path) -> None:
    """Test accuracy against the trained parameters of a task, and against their bytes, without the head; on log axes.

    A method with an adapter has the adapter's colour. If it is stacked on RECAST, its marker is filled and lies a
    little to the right, so that the two bars can be told apart. Bars are standard deviations over the seeds. A method
    that trains only a head is a line.
    """
    names = dict.fromkeys(method.colored_as for method in methods if method.parameters)
    colors = dict(zip(names, itertools.cycle(DISTINCT), strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, unit in zip(panels, ("parameters", "bytes"), strict=True):
            for method in methods:
                accuracy, spread = 100 * method.accuracy, 100 * method.spread
                size = method.parameters if unit == "parameters" else method.bits / 8
                if not size:
                    axes.axhline(accuracy, color=TRAIN, linestyle="--", linewidth=1, label=method.label)
                    axes.axhspan(accuracy - spread, accuracy + spread, color=TRAIN, alpha=0.12, linewidth=0)
                    continue
                recast = method.model == "recast" and not method.adapter
                color = colors[method.colored_as]
                axes.errorbar(
                    size * (1.12 if method.stacked else 1),
                    accuracy,
                    spread,
                    fmt="*" if recast else "s" if method.model == "full" else "o",
                    color=color,
                    markerfacecolor=color if method.stacked or recast else "white",
                    markersize=11 if recast else 7,
                    capsize=2,
                    label=method.label,
                )
            axes.set(xscale="log", xlabel=f"{unit} of a task, without the head")
            plain_powers(axes.xaxis)
        panels[0].set_ylabel("test accuracy in percent")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        save_figure(figure, path)


def sequence(
    tasks: Sequence[str], accuracy: Sequence[Sequence[float]], unknown: Mapping[str, Sequence[float]], path: Path
) -> None:
    """The test accuracy of each task after each, as a heat map; and that of images of unknown task, as curves.

    Args:
        tasks: Names of the tasks.
        accuracy: Row i has the accuracies of the tasks 0 to i after task i.
        unknown: Method → its accuracy after each task; empty where that was not measured.
        path: The file.
    """
    count = len(tasks)
    table = np.full((count, count), np.nan)
    for line, row in zip(table, accuracy, strict=True):
        line[: len(row)] = 100 * np.asarray(row)
    size = 1.8 + 0.55 * count
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(size + (5.2 if unknown else 0.6), max(3.2, 0.9 + 0.42 * count)))
        panels = figure.subplots(1, 2, width_ratios=(size, 4.6)) if unknown else [figure.subplots()]
        axes = panels[0]
        low = float(np.nanmin(table)) - 20
        axes.imshow(table, cmap="Blues", vmin=low, vmax=100, aspect="auto")
        for (after, task), value in np.ndenumerate(table):
            if not np.isnan(value):
                color = "white" if value > (low + 100) / 2 else "black"
                axes.text(task, after, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(count), tasks, fontsize=7, rotation=30, ha="right")
        axes.set_yticks(range(count), tasks, fontsize=7)
        axes.set(xlabel="test accuracy in percent of", ylabel="after training on")
        if unknown:
            axes, marks = panels[1], itertools.cycle("osD^vP")
            for (label, curve), shade, mark in zip(unknown.items(), itertools.cycle(DISTINCT), marks, strict=False):
                axes.plot(
                    range(1, len(curve) + 1), 100 * np.asarray(curve), marker=mark, ms=4, color=shade, label=label
                )
            axes.set(xlabel="tasks so far", ylabel="accuracy in percent, task unknown")
            axes.set_xticks(range(1, count + 1))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=7)
        save_figure(figure, path)


def reconstruction(layers: dict[str, dict[str, float]], path: Path) -> None:
    """Relative error of each layer's weight, and cosine similarity of its weight and of its features."""
    names = list(layers)
    positions = range(len(names))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.4 + 0.19 * len(names)))
        errors, similarities = figure.subplots(1, 2, sharey=True)
        errors.plot([max(layers[name]["relative_error"], 1e-12) for name in names], positions, "o", color=VAL)
        errors.set(xscale="log", xlabel="relative error of the weight")
        plain_powers(errors.xaxis)
        errors.set_yticks(positions, names, fontsize=7)
        errors.invert_yaxis()
        for key, label, marker, color in (
            ("cosine_similarity", "weight", "o", VAL),
            ("feature_similarity", "features", "x", "#c24b1a"),
        ):
            similarities.plot(
                [layers[name][key] for name in names], positions, marker, color=color, label=label, linestyle="none"
            )
        similarities.set(xlabel="cosine similarity to the original")
        lowest = min(min(row["cosine_similarity"], row["feature_similarity"]) for row in layers.values())
        similarities.set_xlim(min(0.9, lowest - 0.02), 1.01)
        similarities.legend(frameon=False)
        save_figure(figure, path)


def bank_sizes(rows: Sequence[BankSize], pretrained: float, path: Path) -> None:
    """What banks cost, against their size: a line for each solver and dtype.

    Args:
        rows: The banks.
        pretrained: Accuracy of the head with the pretrained weights.
        path: The file.
    """
    lines: dict[tuple[str, str], list[BankSize]] = {}
    for row in rows:
        lines.setdefault((row["solver"], row["dtype"]), []).append(row)
    several = len({dtype for _, dtype in lines}) > 1
    panels = (
        ("error of the layers' outputs", [[row["output_error"] for row in line] for line in lines.values()]),
        ("cosine similarity of the features", [[row["feature_similarity"] for row in line] for line in lines.values()]),
        ("accuracy of a solved head (validation)", [[row["head_accuracy"] for row in line] for line in lines.values()]),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4))
        for axes, (name, values) in zip(figure.subplots(1, 3), panels, strict=True):
            for number, ((solver, dtype), points) in enumerate(lines.items()):
                label = f"{solver}, {dtype}" if several else solver
                shares = [100 * row["share"] for row in points]
                color = DISTINCT[number % len(DISTINCT)]
                axes.plot(shares, values[number], marker="o", color=color, label=label)
            axes.set(xlabel="size of the bank, % of the weights", title=name)
            axes.set_xlim(0, None)
        axes.axhline(pretrained, color="black", linewidth=0.8, linestyle=":", label="pretrained weights")
        axes.legend(frameon=False, loc="lower right")
        save_figure(figure, path)


def _table(rows: Sequence[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Rows of one table, padded with NaN where they are shorter than the longest."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _ticks(columns: int) -> list[int]:
    step = max(1, -(-columns // 8))
    return list(range(0, columns, step))
