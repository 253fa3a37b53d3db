"""From Hydra's sweeps to what is searched. Nothing heavy is imported: the command line is checked with it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from recast_exp.config import keys
from recast_exp.config.grammar import MAX_JOBS
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What one key may be: a number between two ends, both included, or one of several texts.

    Attributes:
        key: The key, with a + where the override has one.
        choices: Texts of Hydra's grammar; empty for a number.
        low: Lower end.
        high: Upper end; never sampled itself where `step` does not lead to it.
        whole: Whether only integers are sampled.
        step: Distance between the values that are sampled.
        log: Whether the logarithm is uniform, not the number.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    whole: bool = False
    step: float | None = None
    log: bool = False

    @classmethod
    def parse(cls, override: Override) -> Parameter:
        """Read a sweep.

        Raises:
            UserError: If nothing can be sampled from it.
        """
        key, value = override.get_key_element(), override.value()
        parameter = None
        if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
            whole = isinstance(value.start, int)
            parameter = cls(key, low=value.start, high=value.end, whole=whole, log="log" in value.tags)
        elif isinstance(value, RangeSweep) and not value.shuffle and value.start is not None and value.stop is not None:
            low, stop, step = value.start, value.stop, value.step
            whole = isinstance(low, int) and isinstance(step, int)
            # As Hydra's own sweep of it: without its stop.
            steps = sum(1 for _ in itertools.islice(override.sweep_iterator(), MAX_JOBS + 1)) - 1
            if step > 0 and steps >= 0:
                parameter = cls(key, (), low, low + steps * step, whole, step, "log" in value.tags)
            elif step > 0:
                raise UserError(f"{key}: expected at least one value, got range({low},{stop},{step}), which is empty")
        if parameter is None:
            choices = itertools.islice(override.sweep_string_iterator(), MAX_JOBS)
            return cls(key, tuple(dict.fromkeys(choices)))
        if expected := parameter._expected():
            raise UserError(f"{key}: expected {expected}, got {parameter.described()}")
        return parameter

    def _expected(self) -> str:
        """What would be right instead; empty where nothing is wrong."""
        field = keys.field_of(self.key.lstrip("+"))
        if self.low > self.high:
            return "the lower end first"
        if self.log and self.low <= 0:
            return "an interval above 0 for tag(log, ...)"
        if self.log and self.step not in (None, 1):
            return "an interval for tag(log, ...), as a range has even steps"
        if not self.whole and field and "int" in str(field.type) and "float" not in str(field.type):
            return f"integers, as in int(interval({self.low:g},{self.high:g}))"
        return ""

    @property
    def ends(self) -> list[str]:
        """The values to check: every choice, or both ends."""
        return list(self.choices) or [self.text(self.low), self.text(self.high)]

    def text(self, value: str | float) -> str:
        """A sampled value as text of Hydra's grammar, floats to the last bit."""
        return str(value) if self.choices else repr(int(value) if self.whole else float(value))

    def described(self) -> str:
        """The parameter in words of Hydra's grammar."""
        if self.choices:
            return f"choice({','.join(self.choices)})"
        numbers = f"{self.text(self.low)},{self.text(self.high)}"
        inner = f"interval({numbers})" if self.step is None else f"interval({numbers}) in steps of {self.step}"
        inner = f"int({inner})" if self.whole and self.step is None else inner
        return f"tag(log,{inner})" if self.log else inner

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=None if self.log else self.step)


def split(given: Iterable[Override]) -> tuple[list[str], list[Parameter]]:
    """Divide overrides into what is the same in all trials, as text, and what is searched; the last of a key counts.

    Raises:
        UserError: If nothing can be sampled from a sweep.
    """
    last = {override.get_key_element(): override for override in given}
    fixed = [override.input_line or "" for override in last.values() if not override.is_sweep_override()]
    return fixed, [Parameter.parse(override) for override in last.values() if override.is_sweep_override()]
