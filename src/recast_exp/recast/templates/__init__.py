"""Where templates come from: one module each, found by name in this package or through an entry point.

The formulas are in `recast.formulas`. A module has

- `ADDED`: whether its templates are added to the frozen weight, which stays in the model, or rebuild it.
- `PER_LAYER`: whether each layer has templates of its own, instead of sharing those of its group.
- `MIXINGS`: the ways in which coefficients and templates make a weight, names that `formulas` knows, the default first.
- `most(shape, num_layers) -> int`: the largest `num_templates` for layers with weights of this shape.
- `usual(shape, num_layers, mixing) -> int`: that of `num_templates=None`.
- `make(weights, rank, mixing, *, seed) -> Tensor`: the templates [n, rows, ...], or the factors
  [r, L · rows + columns], of the weights [L, rows, ...] of a group, float32 on the CPU. `tasks` takes the differences
  that tasks have made instead of a seed. `layers` has none, as the solvers of Neural Mimicry make its templates.

Another package adds one through an entry point, and uses it by `recast.templates=my_templates`:

    [project.entry-points."recast_exp.templates"]
    my_templates = "my_package.my_templates"
"""

from __future__ import annotations

import math
from types import ModuleType

from recast_exp.errors import UserError
from recast_exp.plugins import TEMPLATES


def kind_of(templates: str, mixing: str | None = None) -> tuple[ModuleType, str]:
    """The module of a kind of templates, and how its coefficients are mixed.

    Args:
        templates: Its name.
        mixing: One of its `MIXINGS`; None for its default.

    Raises:
        UserError: If there is no such kind, or it is not mixed so.
    """
    if templates not in (names := TEMPLATES.names()):
        raise UserError(f"templates: expected one of {', '.join(names)}, got {templates!r}")
    kind = TEMPLATES.load(templates)
    if mixing is None:
        return kind, kind.MIXINGS[0]
    if mixing not in kind.MIXINGS:
        raise UserError(f"mixing: expected {' or '.join(kind.MIXINGS)} with templates={templates}, got {mixing!r}")
    return kind, mixing


def coefficients_of(rank: int, mixing: str) -> int:
    """The number of coefficients of a block of rows, for n templates or factors of rank r."""
    return rank if mixing in ("sum", "scales") else rank**2


def rank_of(count: int, mixing: str) -> int:
    """The inverse of `coefficients_of`."""
    return count if mixing in ("sum", "scales") else math.isqrt(count)
