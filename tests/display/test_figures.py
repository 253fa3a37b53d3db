"""The figure of a report: each method has one look in all panels, and a probe is a line."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from recast_exp.display import figures
from recast_exp.display.figures import Point


def test_a_method_has_one_look_in_all_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    birds = [
        Point("probe", 0, 0.7, 0.01, recast=False),
        Point("ours", 48, 0.8, 0.02, recast=True),
        Point("theirs", 7000, 0.9, 0, recast=False),
    ]
    flowers = [birds[2], birds[0]]
    figures.accuracy_by_parameters(
        {"birds": birds, "flowers": flowers, "cars": [birds[1]]}, tmp_path / "deep" / "accuracy.png"
    )
    assert (tmp_path / "deep" / "accuracy.png").stat().st_size > 10_000
    (figure,) = drawn
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["birds", "flowers", "cars"]
    looks = [
        [(bar.lines[0].get_marker(), to_rgb(bar.lines[0].get_color())) for bar in axes.containers] for axes in shown
    ]
    (ours, theirs), (same,), (also,) = looks
    assert (theirs, ours) == (same, also)
    assert ours != theirs
    faces = [bar.lines[0].get_markerfacecolor() for bar in shown[0].containers]
    assert faces[0] != "white"
    assert faces[1] == "white"
    assert [bar.lines[0].get_ydata()[0] for bar in shown[0].containers] == [80, 90]
    assert [bar.lines[0].get_xdata()[0] for bar in shown[0].containers] == [48, 7000]
    (line,) = [line for line in shown[1].lines if line.get_linestyle() == "--"]
    assert set(line.get_ydata()) == {70}
    legend = {handle.get_label(): handle for handle in figure.legends[0].legend_handles}
    assert list(legend) == ["probe", "ours", "theirs"]
    assert legend["theirs"].get_marker() == theirs[0]


def test_many_methods_differ(tmp_path: Path, drawn: list[Figure]) -> None:
    points = [Point(str(number), 10 + number, 0.5, 0, recast=False) for number in range(100)]
    figures.accuracy_by_parameters({"one": points}, tmp_path / "accuracy.png")
    bars = drawn[0].axes[0].containers
    assert (
        len({(bar.lines[0].get_marker(), to_rgb(bar.lines[0].get_color())) for bar in bars}) == 80
    )  # as many as there are looks


def test_a_label_with_dollars_is_text_and_powers_of_ten_are_legible(tmp_path: Path, drawn: list[Figure]) -> None:
    for label in ("$x^$", r"$\frac{$", "5 $ and 6 $"):
        points = [Point(label, count, 0.8, 0.02, recast=True) for count in (48, 48_000)]
        figures.accuracy_by_parameters({label: points}, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    ticks = [text.get_text() for text in drawn[-1].axes[0].get_xticklabels()]
    assert {"10²", "10³", "10⁴"} <= set(ticks)
    assert not any("$" in text for text in ticks)
