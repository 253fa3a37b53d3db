"""What tests of figures share."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from recast_exp.display import figures, plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved in a test; they are written all the same."""
    kept: list[Figure] = []
    save = figures.save_figure

    def keep(figure: Figure, path: Path) -> None:
        kept.append(figure)
        save(figure, path)

    for module in (figures, plots):
        monkeypatch.setattr(module, "save_figure", keep)
    return kept
