"""Comparisons of methods on paired differences: exact sign-flip permutation tests, and intervals of the mean.

Two runs are a pair if they have the same dataset, seed and draw of the training images; a linear probe is paired only
with runs of its backbone, input and training images. The statistic is the mean, over
the datasets, of the mean difference on each, so that all datasets have the same weight, as in the table. If two methods
are equally good, each difference could equally have had the opposite sign. The p-value is the share of all assignments
of signs (including the observed one) whose mean is at least as far from 0 as the observed mean. The distribution of the
differences can be any.

The units that change sign are chosen in two ways, for two questions:

- every pair by itself: do the methods differ *on these datasets*, given the variation over replicates?
- all pairs of a dataset together: would they differ on *other datasets* of this kind? The pairs of a dataset share its
  images and are not independent evidence of that, so the number of datasets limits the p-value.

`scipy.stats.permutation_test` gives the same p-values, and the tests compare with it. It takes one to two seconds for
18 pairs, against less than a millisecond here, and a report compares every two methods.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from recast_exp.report.replicates import Replicate
from recast_exp.report.table import Results, Row, is_comparable, is_probe

EXACT = 20
"""The number of units up to which all 2^n assignments of signs are tried."""
SAMPLES = 100_000
"""The number of assignments that are sampled, with a fixed seed, if there are more units."""

CONFIDENCE = 0.95
"""The level of the intervals."""

Values = Mapping[tuple[str, Replicate], float]
"""(Dataset, replicate) → accuracy."""


@dataclasses.dataclass(frozen=True)
class SignFlip:
    """One test: its two-sided p-value, its number of units, and the smallest p-value that these can give."""

    p: float
    units: int
    smallest: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods compared.

    Attributes:
        difference: First minus second, mean over the datasets that have pairs.
        interval: The 95 % interval of `difference`; None if a dataset has fewer than two pairs.
        pairs: Runs of both with the same dataset and replicate.
        possible: Number of pairs if none were missing.
        runs: The test over pairs; None if there are none.
        datasets: The test over datasets; None if there are fewer than two.
    """

    first: str
    second: str
    difference: float | None
    interval: tuple[float, float] | None
    pairs: int
    possible: int
    runs: SignFlip | None
    datasets: SignFlip | None

    @property
    def note(self) -> str:
        """The number of existing pairs, in words; empty if none is missing."""
        return f"{self.pairs} of {self.possible} pairs" if self.pairs < self.possible else ""


def compare_all(results: Results) -> list[Comparison]:
    """Every two methods that have results, in the order of the table."""
    rows = [row for row in results.rows if row.values]
    return [_compare_rows(first, second) for at, first in enumerate(rows) for second in rows[at + 1 :]]


def compare_with_reference(results: Results) -> list[Comparison]:
    """Every method against its linear probe or, if there is none at all, against the first method of the table."""
    rows = [row for row in results.rows if row.values]
    probes = [row for row in rows if any(map(is_probe, row.runs.values()))]
    references = probes or rows[:1]
    found = []
    for row in rows:
        if row is not references[0]:
            fair = (probe for probe in references if probe is not row and _pairs(row, probe))
            found.append(_compare_rows(row, next(fair, references[0])))
    return found


def _pairs(first: Row, second: Row) -> set[tuple[str, Replicate]]:
    """The datasets and replicates of which both have a run, so that the two may be compared."""
    return {key for key in first.runs.keys() & second.runs.keys() if is_comparable(first.runs[key], second.runs[key])}


def _compare_rows(first: Row, second: Row) -> Comparison:
    possible = sum(
        len(cell.expected) for name, cell in first.cells.items() if not cell.absent and not second.cells[name].absent
    )
    pairs = _pairs(first, second)
    possible -= len((first.runs.keys() & second.runs.keys()) - pairs)
    kept = {key: value for key, value in first.values.items() if key in pairs}
    return compare((first.method, second.method), kept, second.values, possible)


def compare(names: tuple[str, str], first: Values, second: Values, possible: int) -> Comparison:
    """Test two methods against each other on the runs that both have finished.

    Args:
        names: Their names in the table.
        first: Accuracies of the first.
        second: Accuracies of the second.
        possible: Number of pairs if none were missing.
    """
    by_dataset: dict[str, list[float]] = {}
    for key in first:
        if key in second:
            by_dataset.setdefault(key[0], []).append(first[key] - second[key])
    pairs = sum(map(len, by_dataset.values()))
    if not pairs:
        return Comparison(*names, None, None, 0, possible, None, None)
    means = [sum(values) / len(values) for values in by_dataset.values()]
    shares = [value / len(values) for values in by_dataset.values() for value in values]
    return Comparison(
        *names,
        difference=sum(means) / len(means),
        interval=mean_interval(list(by_dataset.values())),
        pairs=pairs,
        possible=possible,
        runs=sign_flip(shares),
        datasets=sign_flip(means) if len(means) > 1 else None,
    )


def mean_interval(by_dataset: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the mean difference, by Student's t, with the same weight for all datasets.

    For D datasets with n_d differences each, of mean m_d and sample variance v_d (division by n_d - 1)::

        mean     = sum(m_d) / D
        variance = sum(v_d / n_d) / D²
        freedom  = sum(v_d / n_d)² / sum((v_d / n_d)² / (n_d - 1))
        interval = mean ± t(0.975, freedom) · sqrt(variance)

    The degrees of freedom are those of F. E. Satterthwaite (1946), "An approximate distribution of estimates of
    variance components", Biometrics Bulletin 2(6), 110-114, and B. L. Welch (1947), "The generalization of 'Student's'
    problem when several different population variances are involved", Biometrika 34, 28-35. With one dataset they are
    n - 1, and the interval is that of the paired t-test. It takes the differences for independent and about normal.

    Args:
        by_dataset: The differences on each dataset.

    Returns:
        Both ends, equal if no dataset's differences vary; None if a dataset has fewer than two differences.
    """
    if min(map(len, by_dataset)) < 2:
        return None
    from scipy import special  # a fifth of a second: not before the first job of a sweep

    mean = statistics.fmean(map(statistics.fmean, by_dataset))
    parts = [statistics.variance(values) / len(values) for values in by_dataset]
    if not any(parts):
        return mean, mean
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, by_dataset, strict=True))
    margin = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(sum(parts)) / len(parts)
    return mean - margin, mean + margin


def sign_flip(values: Sequence[float]) -> SignFlip:
    """Test whether the sum of differences is further from 0 than random signs would make it.

    Args:
        values: The differences [n], each weighted.

    Returns:
        The two-sided p-value: exact up to 20 differences, else from 100,000 samples (the observed signs count as one).
    """
    differences = np.asarray(values, dtype=np.float64)
    # Sums that differ only by rounding are ties
    limit = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    n = len(differences)
    if n <= EXACT:
        sums = differences[:1].copy()  # the first keeps its sign: flipping all signs gives the same distance from 0
        for value in differences[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return SignFlip(float(np.mean(np.abs(sums) >= limit)), n, 2.0 ** (1 - n))
    extreme = int(np.count_nonzero(np.abs(_signs(n) @ differences) >= limit))
    return SignFlip((extreme + 1) / (SAMPLES + 1), n, 1 / (SAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of several p-values, which bounds the probability of even one false positive among them."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


@functools.lru_cache(maxsize=2)
def _signs(n: int) -> npt.NDArray[np.float64]:
    """Signs [SAMPLES, n], sampled once."""
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0]), size=(SAMPLES, n))
