"""The comparison plot: the look of a method follows from what it is, not from its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from recast_exp.display import plots
from recast_exp.display.plots import Compared


def test_marks_follow_from_the_methods(tmp_path: Path, drawn: list[Figure]) -> None:
    def method(label: str, model: str, adapter: str = "", parameters: int = 1000) -> Compared:
        return Compared(label, model, adapter, parameters, 32 * parameters, accuracy=0.5, spread=0.01)

    methods = [
        method("a probe", "frozen", parameters=0),
        method("ours + mine", "recast"),
        method("LoRA (r = 4)", "frozen", "LoRA (r = 4)"),
        method("both", "recast", "LoRA (r = 4)"),
        method("everything", "full"),
    ]
    plots.comparison(methods, tmp_path / "comparison.png")
    (figure,) = drawn
    for axes, unit in zip(figure.axes, (1, 4), strict=True):
        marks: dict[str, Any] = {container.get_label(): container.lines[0] for container in axes.containers}
        assert {label: mark.get_marker() for label, mark in marks.items()} == {
            "ours + mine": "*", "LoRA (r = 4)": "o", "both": "o", "everything": "s"
        }  # fmt: skip
        filled = {label for label, mark in marks.items() if to_rgb(mark.get_markerfacecolor()) != (1, 1, 1)}
        assert filled == {"ours + mine", "both"}
        assert marks["both"].get_color() == marks["LoRA (r = 4)"].get_color() != marks["ours + mine"].get_color()
        assert marks["both"].get_xdata() == pytest.approx([1.12 * 1000 * unit])
        assert marks["LoRA (r = 4)"].get_xdata() == pytest.approx([1000 * unit])
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {each.label for each in methods}
