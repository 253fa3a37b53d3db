"""The pictures of a task: sound files at every size and for every name, and what is written in them."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from recast_exp.display.image_plots import (
    EMPTY_ROW,
    Mistake,
    _confusion_figure,
    _cut,
    _mistakes_figure,
    _pairs_figure,
    _sheet_figure,
    _style,
    _width,
    confusion_matrix,
    contact_sheet,
    mistakes,
)

AWKWARD = ["a_b", "$x_1$", "100% $", "été", "中文类别", "W" * 300, "line\nbreak", "", "\\frac{1", "مرحبا"]


@pytest.fixture(autouse=True)
def untouched():
    """No picture may warn, nor change what other code draws with matplotlib."""
    before = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(mpl.rcParams) == before


def noise(count: int, size: int = 8) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def named(count: int) -> list[str]:
    return (AWKWARD + [f"class_{index}_of_{count}" for index in range(count)])[:count]


def confusion(classes: int) -> Tensor:
    counts = torch.randint(3, (classes, classes), generator=torch.Generator().manual_seed(0))
    counts += torch.eye(classes, dtype=torch.int64) * 20
    counts[classes // 2] = 0
    return counts


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pictures(figure: Figure) -> list[AxesImage]:
    return figure.axes[0].get_images()


def assert_readable(figure: Figure) -> None:
    """Every text is inside the figure as it is saved, and none touches another."""
    FigureCanvasAgg(figure)
    figure.set_dpi(150)
    with _style():
        figure.draw_without_rendering()  # places the labels of the axes
        written = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
        boxes = np.array([text.get_window_extent().padded(-1).extents for text in written])
    low, high = boxes[:, :2], boxes[:, 2:]
    assert (low >= 0).all() and (high <= figure.bbox.size).all()
    touching = ((low[:, None] < high) & (low < high[:, None])).all(-1)
    assert touching.sum() == len(written), "each text meets itself only"


@pytest.mark.parametrize(("count", "pixels"), [(1, 8), (9, 16), (40, 224), (2, 384)])
def test_contact_sheet_is_a_small_file_at_every_size(count: int, pixels: int, tmp_path: Path) -> None:
    path = tmp_path / "plots" / "sheet.png"
    contact_sheet(noise(count, pixels), torch.arange(count) % 10, AWKWARD, path, title="A batch $\\frac$ of 中文")
    width, height = size(path)
    assert 500 < width < 1600 and 150 < height < 1000
    assert path.stat().st_size < 3_000_000  # noise is the worst case: photographs take less than 2 MB
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_contact_sheet_names_at_most_32_images_in_order() -> None:
    labels = torch.arange(40) % 3
    with _style():
        figure = _sheet_figure(noise(40), labels, ["ant", "bee", "cat"], "the title")
    assert len(pictures(figure)) == 32
    assert texts(figure) == ["the title", *["ant", "bee", "cat"] * 10, "ant", "bee"]
    assert np.array_equal(pictures(figure)[5].get_array(), noise(40)[5].permute(1, 2, 0).numpy())
    assert pictures(figure)[5].get_interpolation() == "nearest"


def test_captions_stand_above_their_images() -> None:
    with _style():
        figure = _sheet_figure(noise(11), torch.arange(11), [str(index) for index in range(11)], "")
    for image, text in zip(pictures(figure), figure.axes[0].texts[1:], strict=True):
        left, right, _, top = image.get_extent()
        x, y = text.get_position()
        assert x == pytest.approx((left + right) / 2) and 0 < top - y < 0.1


@pytest.mark.parametrize("count", [1, 9, 32])
def test_sheets_are_readable(count: int) -> None:
    title = "A title that is much too long for one line of a figure with few images " * 3
    with _style():
        assert_readable(_sheet_figure(noise(count), torch.arange(count) % 10, AWKWARD, title))


def pairs_of(counts: torch.Tensor) -> dict[tuple[int, int], int]:
    return {(label, predicted): int(counts[label, predicted]) for label, predicted in counts.nonzero().tolist()}


def test_of_more_than_a_thousand_classes_only_pairs_are_shown(tmp_path: Path) -> None:
    counts = {(label, label): 3 for label in range(21_841)} | {(7, 20_000): 9, (8, 9): 2}
    with _style():
        figure = _pairs_figure(counts, named(21_841))
        assert_readable(figure)
    assert not pictures(figure)
    assert texts(figure)[0].startswith("Accuracy 100.0%: 65523 of 65534")
    assert texts(figure)[2].endswith(": 9") and texts(figure)[3].endswith(": 2")
    confusion_matrix(counts, named(21_841), tmp_path / "confusion.png")
    assert size(tmp_path / "confusion.png")[1] < 400


@pytest.mark.parametrize("classes", [2, 67])
def test_confusion_matrix_is_a_small_file_for_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    confusion_matrix(pairs_of(confusion(classes)), named(classes), tmp_path / "confusion.png")
    width, height = size(tmp_path / "confusion.png")
    assert 350 < width < 2200 and 200 < height < 1800
    assert (tmp_path / "confusion.png").stat().st_size < 1_000_000


@pytest.mark.parametrize("classes", [1, 2, 5, 30, 31, 200])
def test_confusion_matrix_is_readable_for_any_number_of_classes(classes: int) -> None:
    counts = confusion(classes) if classes != 30 else torch.eye(30, dtype=torch.int64) * 12345
    with _style():
        assert_readable(_confusion_figure(pairs_of(counts), named(classes)))


def test_confusion_matrix_writes_names_and_counts() -> None:
    counts = torch.tensor([[90, 10, 0], [0, 0, 0], [3, 0, 1]])
    with _style():
        figure = _confusion_figure(pairs_of(counts), ["ant", "bee", "cat"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ant", "bee", "cat"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ant", "bee", "cat"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert cells == {
        (0, 0): ("90", "white"),
        (1, 0): ("10", "black"),  # a column is a prediction: ant taken for bee
        (0, 2): ("3", "white"),
        (2, 2): ("1", "black"),
    }
    assert "Accuracy 87.5%: 91 of 104 images (grey: a class without images)" in texts(figure)
    shares = axes.get_images()[0].get_array()
    assert np.allclose(shares[[0, 2]], [[0.9, 0.1, 0.0], [0.75, 0.0, 0.25]])
    colors = axes.get_images()[0].to_rgba(shares)
    assert np.allclose(colors[1, :, :3], to_rgb(EMPTY_ROW))


def test_confusion_matrix_leaves_out_counts_that_do_not_fit() -> None:
    counts = torch.ones(12, 12, dtype=torch.int64)
    counts[0, 1] = 10**9
    with _style():
        figure = _confusion_figure(pairs_of(counts), named(12))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1"] * 143


def test_confusion_matrix_of_many_classes_lists_the_most_confused() -> None:
    counts = torch.eye(67, dtype=torch.int64) * 10
    counts[3, 5], counts[60, 2] = 4, 7
    with _style():
        figure = _confusion_figure(pairs_of(counts), [f"c{index}" for index in range(67)])
    assert not figure.axes[0].texts
    written = texts(figure)
    start = written.index("Most confused (true → predicted: images)")
    assert written[start + 1 : start + 3] == ["c60 → c2: 7", "c3 → c5: 4"]
    assert sum("→" in text for text in written) == 3


@pytest.mark.parametrize("classes", [2, 31])
def test_confusion_matrix_without_images_or_without_mistakes(classes: int) -> None:
    with _style():
        empty = _confusion_figure(pairs_of(torch.zeros(classes, classes, dtype=torch.int64)), named(classes))
        perfect = _confusion_figure(pairs_of(torch.eye(classes, dtype=torch.int64)), named(classes))
    assert "No images" in texts(empty)
    assert f"Accuracy 100.0%: {classes} of {classes} images" in texts(perfect)
    assert ("No class is mistaken for another." in texts(perfect)) == (classes == 31)


def test_mistakes_show_at_most_16_with_the_true_class_first() -> None:
    rows = [Mistake(label=0, predicted=1, probability=0.876)] * 20
    with _style():
        figure = _mistakes_figure(noise(20), rows, ["cat", "dog"])
    assert len(pictures(figure)) == 16
    assert texts(figure)[0].startswith("Worst mistakes: true class → predicted class")
    assert texts(figure)[1:] == ["cat\n→ dog (88%)"] * 16


@pytest.mark.parametrize(("count", "pixels"), [(0, 8), (1, 384), (16, 32)])
def test_mistakes_are_drawn_and_readable(count: int, pixels: int, tmp_path: Path) -> None:
    rows = [Mistake(index % 10, (index + 3) % 10, 1.0) for index in range(count)]
    mistakes(noise(count, pixels), rows, AWKWARD, tmp_path / "mistakes.png")
    width, height = size(tmp_path / "mistakes.png")
    assert 500 < width < 1200 and 70 < height < 1300
    with _style():
        figure = _mistakes_figure(noise(count, pixels), rows, AWKWARD)
        assert_readable(figure)
    assert ("No mistakes" in texts(figure)) == (count == 0)


@pytest.mark.parametrize("text", [*AWKWARD, "Yellow_headed_Blackbird" * 3])
def test_long_names_are_cut_in_the_middle(text: str) -> None:
    with _style():
        cut = _cut(text, 60, 7)
        assert _width(cut, 7) <= 60
    if cut != " ".join(text.split()):
        start, end = cut.split("…")
        assert text.startswith(start) and text.endswith(end) and abs(len(start) - len(end)) <= 1
