"""Solvers of Neural Mimicry: one module each, found by name in this package or through an entry point.

A module has

- `solve(weights, num_templates, num_sets, num_blocks, *, seed, progress, …) -> Mimicked`: templates and coefficients
  for the weights [L, rows, ...] of one group, float32 on the CPU. Its other keyword-only parameters are the options of
  the solver; each has a default. `progress` is called after each step. Random numbers come from a generator of its own
  with that seed.
- `refine(network, groups, batches, *, seed, progress, …) -> list[Mimicked]`, if it needs images: goes on from what
  `solve` has found for all groups, with images [N, 3, H, W]. The options are then those of `refine`.
- `num_steps(weights, **options) -> int`, if it iterates: how often it calls `progress` for such weights with these
  options, of which it names those that count. Progress bars use it.

A preset `conf/mimicry/NAME.yaml` makes it an option of the command line; nothing else is edited. An option that is a
key of the section `mimicry` (`steps`, `lr`, …) takes its value from there, any other from `mimicry.options`. Another
package adds a solver through an entry point:

    [project.entry-points."recast_exp.solvers"]
    my_solver = "my_package.my_solver"
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import ModuleType

from recast_exp.errors import UnknownNameError, UserError, check_integer
from recast_exp.plugins import SOLVERS


def options_of(solver: ModuleType) -> tuple[str, ...]:
    """The names of the options that a solver takes, in the order of its signature."""
    if not hasattr(solver, "solve"):  # `check_options` refuses it
        return ()
    parameters = inspect.signature(getattr(solver, "refine", solver.solve)).parameters.values()
    keywords = (parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name in keywords if name not in {"seed", "progress"})


def needs_images(name: str) -> bool:
    """Whether a solver goes on with images from what it has found without."""
    return hasattr(SOLVERS.load(name), "refine")


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options that a solver does not take, and integers and numbers that are none, or not positive.

    Args:
        name: The solver.
        options: Option → value; None is the solver's own choice.

    Raises:
        UnknownNameError: If there is no such solver, or it has no such option.
        UserError: If its module has no function `solve`, or a value is of another type than the solver's signature
            says, or out of range.
    """
    solver = SOLVERS.load(name)
    if not hasattr(solver, "solve"):
        raise UserError(f"name: expected the module {solver.__name__} of {name} to have the function solve, got none")
    accepted = options_of(solver)
    types = inspect.signature(getattr(solver, "refine", solver.solve)).parameters
    for option, value in options.items():
        if option not in accepted:
            expected = f"one of {', '.join(accepted)}" if accepted else "no options"
            raise UnknownNameError(f"options.{option}: expected {expected} (solver {name}), got {option}")
        kind = str(types[option].annotation)
        if value is None and "None" in kind:
            continue
        if kind.startswith("int"):
            check_integer(f"options.{option}", value, 1, 2**31)
        elif kind.startswith("float"):
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            if not 0 <= number < 1e30 or (number == 0 and option != "noise"):
                raise UserError(f"options.{option}: expected a number > 0, got {value!r}")
