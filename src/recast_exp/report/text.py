"""The cells of a report's tables as strings: accuracies in percent, counts with their range, p-values."""

from __future__ import annotations

from recast_exp.config.grammar import short
from recast_exp.report.comparing import SignFlip
from recast_exp.report.table import Average, Cell

NOTHING = "–"


def accuracy(mean: float | None, std: float | None = None) -> str:
    """`80.1 ± 0.4` for accuracies from 0 to 1."""
    if mean is None:
        return NOTHING
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def measured(cell: Cell | Average) -> str:
    """A cell with a note on missing results: `80.1 (1 of 3 seeds)`."""
    return noted(accuracy(cell.mean, cell.std), cell.note)


def difference(value: float | None) -> str:
    """`+2.1` for a difference of accuracies."""
    return NOTHING if value is None else f"{100 * value:+.1f}".replace("-", "−")


def interval(value: tuple[float, float] | None) -> str:
    """`−0.9 to 5.9` for the interval of a difference; empty if there is none."""
    return "" if value is None else " to ".join(f"{100 * end:.1f}" for end in value).replace("-", "−")


def sampled(value: str | None) -> str:
    """A value that a search has sampled."""
    return NOTHING if value is None else short(value)


def noted(value: str, note: str) -> str:
    """A value, followed by a note in brackets if there is one."""
    return f"{value} ({note})" if note else value


def count(span: tuple[int, int] | None) -> str:
    """An integer, or the range of the integers of several runs."""
    if span is None:
        return NOTHING
    low, high = span
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def p_value(p: float | None) -> str:
    """A p-value with two significant digits."""
    if p is None:
        return NOTHING
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def smallest(test: SignFlip) -> str:
    """The smallest p-value that a test can give."""
    return f"{test.smallest:.2g}"
