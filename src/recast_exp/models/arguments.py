"""Which arguments a model of timm may be given, by a command or by a file of others."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping

import timm
from timm.models import build_model_with_cfg

from recast_exp.errors import UserError

LARGEST = 2**14
"""Of a number among the arguments, such as a width, and of the sum of a list: a file must not fill the memory."""

_MOST = 2**10
"""Of a number of layers or blocks, each of which takes time and memory even without values."""

_COUNTS = re.compile("depth|layer|block")

_OF_LOADING = frozenset(
    {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    | {"features_only", "out_indices", "feature_cls", "hf_hub_id", "url", "file"}
) - {"kwargs"}
"""What timm takes beside the arguments of a model: a file must not choose what is loaded."""


def check_arguments(arguments: Mapping[str, object], prefix: str) -> None:
    """Refuse what no model should be given: other channels, what decides how it is loaded, numbers out of all range.

    Args:
        arguments: Name → value.
        prefix: What messages put before a name: `model.arguments.`.

    Raises:
        UserError: One line.
    """
    if arguments.get("in_chans", 3) != 3:
        raise UserError(f"{prefix}in_chans: expected 3, as images have three, got {arguments['in_chans']}")
    for key, value in arguments.items():
        if key in _OF_LOADING:
            raise UserError(f"{prefix}{key}: expected an argument of the model, got one of how timm makes and loads it")
        most = _MOST if _COUNTS.search(key) else LARGEST
        if not sum(abs(number) for number in _numbers(value)) <= most:  # NaN is no less
            total = "" if isinstance(value, int | float) else " in all"
            raise UserError(f"{prefix}{key}: expected at most {most}{total}, got {str(value)[:200]}")
        # timm takes any number, and training then fails
        if "drop" in key and key.endswith("_rate") and isinstance(value, int | float) and not 0 <= value < 1:
            raise UserError(f"{prefix}{key}: expected a number ≥ 0 and < 1, got {value}")


def _numbers(value: object) -> Iterator[float]:
    """Every number in a value."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield min(value, math.inf)
