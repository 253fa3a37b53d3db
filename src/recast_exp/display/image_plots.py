"""The pictures of a task: its images as the model sees them, and the confusions of its classes, as PNG files."""

from __future__ import annotations

import contextlib
import heapq
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from torch import Tensor

from recast_exp.display.figures import STYLE, save_figure

SHEET_IMAGES, MISTAKES, PAIRS = 32, 16, 20
MATRIX_CLASSES = 1000  # with more, a row is thinner than a pixel, and the table takes gigabytes
NAMED_CLASSES = 30  # with more, neither names nor counts are legible in a figure of a reasonable size
MARGIN = 0.12  # inches
LINE = 1.3  # height of a line of text, relative to its font size
EMPTY_ROW = "#e4e4e4"


@dataclass(frozen=True)
class Mistake:
    """An image's class, the class predicted instead, and the probability that the model gave to the latter."""

    label: int
    predicted: int
    probability: float


def contact_sheet(images: Tensor, labels: Tensor, classes: Sequence[str], path: Path, *, title: str = "") -> None:
    """The images of a batch in a grid, as the model sees them, with their class names.

    Args:
        images: uint8 [N, 3, S, S]; the first 32 are shown.
        labels: int64 [N].
        classes: Name of each class.
        path: The PNG to write.
        title: Heading of the figure, wrapped if it is too long.
    """
    with _style():
        save_figure(_sheet_figure(images, labels, classes, title), path)


def predictions(images: Tensor, rows: Sequence[tuple[str, float]], path: Path, *, title: str) -> None:
    """Images in a grid, each under its predicted class and the probability of it.

    Args:
        images: uint8 [N, 3, S, S].
        rows: Class and probability of each.
        path: The PNG to write.
        title: Heading of the figure.
    """
    with _style():
        side, size = 1.2, 6.5
        captions = []
        for label, probability in rows:
            share = f" ({probability:.0%})"
            captions.append(_cut(label, side * 72 - _width(share, size), size) + share)
        save_figure(_grid(images, captions, title, columns=8, side=side, size=size), path)


Pairs = Mapping[tuple[int, int], int]
"""(true class, predicted class) → the number of such images; pairs without any may be left out."""


def confusion_matrix(counts: Pairs, classes: Sequence[str], path: Path) -> None:
    """Counts of the predictions for each true class, coloured by their share of the true class.

    Up to 30 classes are named, with the counts in the cells (zeros left blank); with more, the figure names some of
    the classes and lists the most confused pairs; with more than a thousand, there is only that list. The row of a
    class without any image is grey.

    Args:
        counts: The predictions.
        classes: Name of each class.
        path: The PNG to write.
    """
    with _style():
        draw = _confusion_figure if len(classes) <= MATRIX_CLASSES else _pairs_figure
        save_figure(draw(counts, classes), path)


def mistakes(images: Tensor, rows: Sequence[Mistake], classes: Sequence[str], path: Path) -> None:
    """The worst mistakes, in the order given: each image under its true and its predicted class.

    Args:
        images: uint8 [n, 3, S, S]; the first 16 are shown. There may be none.
        rows: One for each image.
        classes: Name of each class.
        path: The PNG to write.
    """
    with _style():
        save_figure(_mistakes_figure(images, rows, classes), path)


def _sheet_figure(images: Tensor, labels: Tensor, classes: Sequence[str], title: str) -> Figure:
    side, size = 1.1, 6.5  # if larger, 32 photographs would make a file of several megabytes
    captions = [_cut(classes[label], side * 72, size) for label in labels[:SHEET_IMAGES].tolist()]
    return _grid(images[:SHEET_IMAGES], captions, title, columns=8, side=side, size=size)


def _mistakes_figure(images: Tensor, rows: Sequence[Mistake], classes: Sequence[str]) -> Figure:
    side, size = 1.5, 7.0
    captions = []
    for row in rows[:MISTAKES]:
        probability = f" ({row.probability:.0%})"
        room = side * 72 - _width(f"→ {probability}", size)
        captions.append(
            f"{_cut(classes[row.label], side * 72, size)}\n→ {_cut(classes[row.predicted], room, size)}{probability}"
        )
    title = "Worst mistakes: true class → predicted class (its probability)" if captions else "No mistakes"
    return _grid(images[:MISTAKES], captions, title, columns=4, side=side, size=size)


def _grid(images: Tensor, captions: list[str], title: str, *, columns: int, side: float, size: float) -> Figure:
    """Square images [n, 3, S, S] of `side` inches, under captions of font size `size` that are not wider."""
    count = len(captions)
    rows = -(-count // columns)
    columns = -(-count // max(rows, 1))  # nine images are shown as five and four, not as eight and one
    caption = max((text.count("\n") + 1 for text in captions), default=0) * size * LINE / 72 + 0.02
    width = max(MARGIN + columns * (side + MARGIN), 4.0)
    heading = _wrap(title, (width - 2 * MARGIN) * 72, 9)
    top = MARGIN + len(heading) * (9 * LINE / 72) + (0.06 if heading else 0)
    height = max(top + rows * (caption + side + MARGIN), 0.5)
    figure = Figure(figsize=(width, height))
    axes = _canvas(figure)
    axes.text(MARGIN, MARGIN, "\n".join(heading), va="top", fontsize=9)
    # Matplotlib's default, regardless of the user's configuration: small images keep their pixels
    interpolation = "nearest" if images.shape[-1] < 64 else "antialiased"
    for index, (image, text) in enumerate(zip(images.cpu().permute(0, 2, 3, 1).numpy(), captions, strict=True)):
        x = MARGIN + index % columns * (side + MARGIN)
        y = top + index // columns * (caption + side + MARGIN) + caption
        axes.imshow(image, extent=(x, x + side, y + side, y), interpolation=interpolation)
        axes.text(x + side / 2, y - 0.03, text, ha="center", va="bottom", fontsize=size)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")  # `imshow` has changed them
    return figure


def _pairs_figure(counts: Pairs, classes: Sequence[str]) -> Figure:
    heading = _heading(counts)
    lines = _confused(counts, classes, 400, 8)
    width = 2 * MARGIN + max(_width(heading, 9), *(_width(line, 8) for line in lines)) / 72
    figure = Figure(figsize=(width, 0.5 + len(lines) * 8 * 1.6 / 72))
    canvas = _canvas(figure)
    canvas.text(MARGIN, MARGIN, heading, va="top", fontsize=9)
    for index, line in enumerate(lines):
        canvas.text(MARGIN, 0.4 + index * 8 * 1.6 / 72, line, va="top", fontsize=8)
    return figure


def _heading(counts: Pairs) -> str:
    total = sum(counts.values())
    right = sum(count for (label, predicted), count in counts.items() if label == predicted)
    return f"Accuracy {right / total:.1%}: {right} of {total} images" if total else "No images"


def _confusion_figure(counts: Pairs, classes: Sequence[str]) -> Figure:
    num_classes = len(classes)
    table = np.zeros((num_classes, num_classes), dtype=np.int64)
    for pair, count in counts.items():
        table[pair] = count
    named = num_classes <= NAMED_CLASSES
    side = num_classes * min(0.8, max(0.28, 4.5 / num_classes)) if named else 7.0
    pitch = side * 72 / num_classes  # points per class
    size = (8.0 if num_classes <= 12 else 7.0) if named else 5.5
    step = max(1, math.ceil(size * LINE / pitch))
    names = [_cut(name, 120, size) for name in classes[::step]]
    widest = max(_width(name, size) for name in names)
    upright = widest > 0.9 * pitch * step
    totals = table.sum(1, keepdims=True)
    heading = _heading(counts)
    if 0 < (totals > 0).sum() < num_classes:
        heading += " (grey: a class without images)"
    pairs = [] if named else _confused(counts, classes, 230, 7)

    left, bottom = 0.45 + widest / 72, 0.45 + (widest if upright else size * LINE) / 72
    list_left = left + side + 1.1
    width = max([list_left, *(list_left + MARGIN + _width(line, 7) / 72 for line in pairs)])
    width = max(width, 2 * MARGIN + _width(heading, 9) / 72)
    height = bottom + side + 0.4
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    shares = np.where(totals > 0, table / np.maximum(totals, 1), np.nan)
    colors = mpl.colormaps["Blues"].with_extremes(bad=EMPTY_ROW)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # confusions of a few percent must be visible
    image = axes.imshow(shares, cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(0, num_classes, step), names, fontsize=size, rotation=90 if upright else 0)
    axes.set_yticks(range(0, num_classes, step), names, fontsize=size)
    axes.spines[:].set_visible(True)
    scale = figure.add_axes(((left + side + 0.15) / width, bottom / height, 0.15 / width, side / height))
    figure.colorbar(image, cax=scale, label="share of the true class", ticks=[0, 0.05, 0.2, 0.5, 1], format="{x:.0%}")
    canvas = _canvas(figure)
    canvas.text(MARGIN, MARGIN, heading, va="top")
    for index, line in enumerate(pairs):  # one by one, as the lines of one text are unevenly spaced
        canvas.text(list_left, 0.4 + index * 7 * 1.6 / 72, line, va="top", fontsize=7)
    dark = norm(shares) > 0.7
    for row, column in np.argwhere(table) if named else ():
        text = str(table[row, column])
        if _width(text, size) < 0.9 * pitch:
            color = "white" if dark[row, column] else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    return figure


def _confused(counts: Pairs, classes: Sequence[str], width: float, size: float) -> list[str]:
    """The most confused pairs of classes, in lines of at most `width` points, under a heading."""
    wrong = [(-count, *pair) for pair, count in counts.items() if count and pair[0] != pair[1]]
    lines = []
    for count, label, predicted in heapq.nsmallest(PAIRS, wrong):
        room = (width - _width(f" → : {-count}", size)) / 2
        lines.append(f"{_cut(classes[label], room, size)} → {_cut(classes[predicted], room, size)}: {-count}")
    return ["Most confused (true → predicted: images)", *lines] if lines else ["No class is mistaken for another."]


def _canvas(figure: Figure) -> Axes:
    """Axes over the whole figure whose units are inches from its upper left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return axes


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """The style of these figures: they are laid out by hand, and a name is never read as a formula."""
    changes = {
        "axes.grid": False,
        "figure.constrained_layout.use": False,
        "text.parse_math": False,
        "text.usetex": False,
    }
    with mpl.rc_context(STYLE | changes), warnings.catch_warnings():
        # The installed fonts decide which scripts can be rendered; missing glyphs are not worth a warning each
        warnings.filterwarnings("ignore", "Glyph .* missing from|Matplotlib currently does not support .* natively")
        yield


def _width(text: str, size: float) -> float:
    """Width of a line of text of font size `size`, in points."""
    width = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0]
    return float(width) * 1.04  # rendered letters are moved to whole pixels


def _cut(text: str, width: float, size: float) -> str:
    """The text on one line, its middle replaced by … if it is wider than `width` points."""
    text = " ".join(text.split())
    if _width(text, size) <= width:
        return text
    keep = min(len(text) - 1, int(4 * width / size))  # hardly any letter is narrower than a quarter of its size
    while _width(cut := f"{text[: -(-keep // 2)]}…{text[len(text) - keep // 2 :]}", size) > width and keep > 1:
        keep -= 1
    return cut


def _wrap(text: str, width: float, size: float) -> list[str]:
    """The text in lines of at most `width` points."""
    return [_cut(line, width, size) for line in textwrap.wrap(text, int(width / size / 0.6))]
