"""The plots of a run, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from recast_exp.display.figures import DISTINCT, STYLE, TRAIN, VAL, save_figure

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


def coefficients(before: dict[str, Tensor], after: dict[str, Tensor], path: Path) -> None:
    """Heat maps of the coefficients, averaged over their sets: mimicked, trained, and the difference.

    A row is a layer. A column is a template, or a block and a template if the blocks of a weight have separate
    coefficients.
    """
    layers = list(before)
    tables = [_table(list(values.values())) for values in (before, {layer: after[layer] for layer in layers})]
    tables.append(tables[1] - tables[0])
    limits = [max(np.nanmax(np.abs(tables[0])), np.nanmax(np.abs(tables[1])))] * 2 + [np.nanmax(np.abs(tables[2]))]
    # In inches
    width, height = min(2.8, 0.5 + 0.28 * tables[0].shape[1]), 0.2 * len(layers)
    left, bottom, bar, room = 0.3 + 0.06 * max(map(len, layers)), 0.5, 0.12, 0.7
    size = left + 3 * (width + bar + room), bottom + height + 0.35

    def place(x: float, wide: float) -> tuple[float, float, float, float]:
        return x / size[0], bottom / size[1], wide / size[0], height / size[1]

    with mpl.rc_context(PLACED | {"axes.grid": False}):
        figure = Figure(figsize=size)
        titles = ("mimicked", "trained", "difference")
        for number, (table, limit, title) in enumerate(zip(tables, limits, titles, strict=True)):
            x = left + number * (width + bar + room)
            axes = figure.add_axes(place(x, width))
            image = axes.imshow(table, cmap="RdBu_r", vmin=-limit or -1e-12, vmax=limit or 1e-12, aspect="auto")
            axes.set(title=title, xlabel="template" if before[layers[0]].shape[1] == 1 else "block × template")
            axes.set_xticks(_ticks(table.shape[1]))
            axes.set_yticks(range(len(layers)), layers if number == 0 else [], fontsize=7)
            figure.colorbar(image, cax=figure.add_axes(place(x + width + 0.08, bar)))
        save_figure(figure, path)


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
        panels[0].set_ylabel("test accuracy in percent")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
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


def _table(values: list[Tensor]) -> npt.NDArray[np.float64]:
    """Coefficients [K, B, n] of several layers as rows of equal length, padded with NaN."""
    rows = [value.double().mean(0).flatten().numpy() for value in values]
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table


def _ticks(columns: int) -> list[int]:
    step = max(1, -(-columns // 8))
    return list(range(0, columns, step))
