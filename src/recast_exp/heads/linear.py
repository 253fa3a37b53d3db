"""The head of the paper: trained by gradient descent, together with everything else that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from recast_exp.config.fields import option
from recast_exp.heads._base import Features, Head, Setting, Solution


@dataclass
class Linear(Head):
    """Nothing is solved; `calibrate` scales the trained head."""

    solved: ClassVar[bool] = False

    calibrate: bool = option(False, "scale the logits by a temperature that validation chooses")

    def settings(self) -> list[Setting]:
        """There is nothing to choose."""
        return []

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """There is nothing to solve."""
        return iter(())
