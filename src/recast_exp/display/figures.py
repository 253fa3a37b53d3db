"""The style of all figures, and the figure of a report: accuracy against task parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from recast_exp.files import replacing

STYLE: Any = {
    "text.parse_math": False,  # a label is text, dollars and all
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "figure.constrained_layout.use": True,
}
TRAIN, VAL = "#7a7a7a", "#1f6fb4"
DISTINCT = [mpl.colormaps[name](i) for name, count in (("tab10", 10), ("Dark2", 7)) for i in range(count) if i != 7]
_MARKERS = "osD^v<>phX"
_PANEL = (4.1, 3.4)  # inches


@dataclass(frozen=True)
class Point:
    """A method on one dataset.

    Attributes:
        label: Its name.
        parameters: Trained parameters of a task, without the head.
        accuracy: Mean test accuracy, from 0 to 1.
        error: Half the length of its bar; 0 for none.
        recast: Whether it trains coefficients.
    """

    label: str
    parameters: int
    accuracy: float
    error: float
    recast: bool


def plain_powers(axis: Axis) -> None:
    """Write the powers of a logarithmic axis as text, 10²: Matplotlib writes formulas, which `STYLE` does not read."""
    superscripts = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def power(value: float, position: int | None = None) -> str:
        return "10" + str(round(math.log10(value))).translate(superscripts) if value > 0 else ""

    axis.set_major_formatter(FuncFormatter(power))
    axis.set_minor_formatter(NullFormatter())


def accuracy_by_parameters(panels: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Test accuracy against the trained parameters of a task, without the head; a panel for each dataset.

    Methods that train coefficients have filled markers, others have hollow ones. A method that trains only a head is a
    line, with its bar as a band.
    """
    named = {point.label: point for points in panels.values() for point in points}
    marked = [label for label, point in named.items() if point.parameters]
    looks = dict(zip(marked, zip(itertools.cycle(DISTINCT), itertools.cycle(_MARKERS), strict=False), strict=False))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_PANEL[0] * columns + 2.1, max(_PANEL[1] * rows, 0.9 + 0.19 * len(named))))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
        for (name, points), axes in zip(panels.items(), grid, strict=False):
            for point in points:
                accuracy, error = 100 * point.accuracy, 100 * point.error
                if not point.parameters:
                    axes.axhline(accuracy, color=TRAIN, linestyle="--", linewidth=1)
                    axes.axhspan(accuracy - error, accuracy + error, color=TRAIN, alpha=0.12, linewidth=0)
                    continue
                color, marker = looks[point.label]
                axes.errorbar(
                    point.parameters,
                    accuracy,
                    error or None,
                    color=color,
                    marker=marker,
                    markerfacecolor=color if point.recast else "white",
                    markersize=7,
                    capsize=2,
                    linewidth=1,
                )
            axes.set(xscale="log", title=name, xlabel="parameters of a task, without the head")
            plain_powers(axes.xaxis)
            axes.set_ylabel("test accuracy in percent")
            axes.tick_params(labelbottom=True)  # which a shared axis leaves to the last row
        for axes in grid:  # where the last row is not full
            axes.set_visible(False)
        figure.legend(
            handles=[_key(point, looks.get(label)) for label, point in named.items()],
            loc="outside right center",
            frameon=False,
            fontsize=8,
        )
        save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, at 150 dpi."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _key(point: Point, look: tuple[Any, str] | None) -> Line2D:
    if look is None:
        return Line2D([], [], color=TRAIN, linestyle="--", linewidth=1, label=point.label)
    color, marker = look
    face = color if point.recast else "white"
    return Line2D([], [], color=color, marker=marker, markerfacecolor=face, linestyle="none", label=point.label)
