"""The best of all solved heads, by validation: the probe that every result stands beside."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recast_exp.config.fields import option
from recast_exp.errors import UserError
from recast_exp.heads._base import Features, Head, Setting, Solution

log = logging.getLogger(__name__)


@dataclass
class Best(Head):
    """Every head of a list with its own grid, compared by the same measure."""

    heads: list[str] = option(["logistic", "ridge", "lda", "nearest_mean"], "the heads to choose from")

    def problems(self) -> Iterator[str]:
        """No heads, or some that are unknown, trained, or listed twice."""
        from recast_exp.heads import load, names  # which imports this module

        known = {*names()} - {self.name}
        # Not all are loaded for it: one of another package that cannot be is no matter of those that are asked for
        if not self.heads:
            yield "heads: expected at least one, got an empty list"
        elif len({*self.heads}) < len(self.heads) or not all(
            name in known and load(name).solved for name in self.heads
        ):
            solved = [name for name in sorted(known) if _is_solved(name)]
            yield f"heads: expected some of {', '.join(solved)}, each once, got {', '.join(self.heads)}"

    def members(self) -> list[Head]:
        """The heads with their default options, and the weights of classes of this one.

        Raises:
            UserError: If there are `problems`.
        """
        from recast_exp.heads import load

        for line in self.problems():
            raise UserError(line)
        return [load(name)(class_weight=self.class_weight) for name in self.heads]

    def settings(self) -> list[Setting]:
        """Those of all heads, each with the name of its head."""
        return [{"head": head.name, **setting} for head in self.members() for setting in head.settings()]

    def grid(self, num_classes: int) -> list[Setting]:
        """Without heads that would take hours with so many classes."""
        slow = {head.name for head in self.members() if num_classes > getattr(head, "MOST_CLASSES", num_classes)}
        if slow:
            log.info("head=%s: %s is left out, with %d classes", self.name, ", ".join(sorted(slow)), num_classes)
        return [setting for setting in self.settings() if setting["head"] not in slow]

    def solve(self, features: Features, settings: Sequence[Setting]) -> Iterator[Solution]:
        """Solve each head for those of the settings that are its own."""
        for head in self.members():
            own = [setting for setting in settings if setting["head"] == head.name]
            plain = [{name: value for name, value in setting.items() if name != "head"} for setting in own]
            for setting, solution in zip(own, head.solve(features, plain), strict=True):
                yield Solution(solution.weight, solution.bias, setting)


def _is_solved(name: str) -> bool:
    from recast_exp.heads import load  # which imports this module

    try:
        return load(name).solved
    except UserError:  # it cannot be imported
        return False
