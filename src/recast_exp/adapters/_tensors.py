"""Arithmetic that adapters of tensor networks share."""

from __future__ import annotations

import math


def two_factors(number: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller first."""
    small = max(factor for factor in range(1, math.isqrt(number) + 1) if number % factor == 0)
    return small, number // small
