"""Check the options of a plug-in that a program makes (an adapter, a head) against the types and bounds it declares.

Values are converted by the rules that OmegaConf applies to all other keys: the string "4" becomes the integer 4, the
string "yes" becomes true, and 2.5 is not an integer. OmegaConf itself (`config.fields.build`) would be too strict for
an adapter that a program makes: it refuses objects such as a set or a torch.dtype among the arguments of peft, and
gives "???" and "${…}" a meaning of their own.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recast_exp.config import fields
from recast_exp.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_BOOLEANS = {
    **dict.fromkeys(("yes", "y", "on", "true"), True),
    **dict.fromkeys(("no", "n", "off", "false"), False),
}


def check(owner: DataclassInstance) -> None:
    """Convert every field of a dataclass instance to its declared type, in place, and check its range.

    Raises:
        UserError: One line that names every field that is wrong.
    """
    hints = typing.get_type_hints(type(owner))
    wrong = []
    for field in dataclasses.fields(owner):
        value, named = getattr(owner, field.name), _named(field)
        try:
            converted = _convert(value, hints[field.name])
        except (TypeError, ValueError):
            wrong.append(f"{field.name}: expected {fields.accepted(named)}, got {value!r}")
            continue
        except OverflowError:
            wrong.append(f"{field.name}: expected {fields.accepted(named)}, got a number that no float holds")
            continue
        if problem := fields.range_problem(field.name, named, converted):
            wrong.append(problem)
        setattr(owner, field.name, converted)
    if wrong:
        raise UserError(*wrong)


def _named(field: dataclasses.Field[object]) -> dataclasses.Field[object]:
    """A field with its type as text; without postponed annotations, it is a class."""
    named = copy.copy(field)
    if isinstance(field.type, type):
        named.type = field.type.__name__
    return named


def _convert(value: object, hint: object) -> object:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _plain(value)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_one_of(value, arguments)
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    if (origin or hint) is list:
        (of,) = arguments or (Any,)
        return [_convert(item, of) for item in _sequence(value)]
    if (origin or hint) is dict:
        _, of = arguments or (Any, Any)
        return {str(name): _convert(item, of) for name, item in _mapping(value).items()}
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise TypeError(hint)


def _convert_to_one_of(value: object, hints: tuple[object, ...]) -> object:
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        try:
            return _convert(value, hint)
        except (TypeError, ValueError):
            continue
    raise TypeError(hints)


def _integer(value: object) -> int:
    if type(value) is int or type(value) is str:
        return int(value)
    raise TypeError


def _number(value: object) -> float:
    if type(value) is float or type(value) is int or type(value) is str:
        return float(value)
    raise TypeError


def _boolean(value: object) -> bool:
    if isinstance(value, bool | int):
        return bool(value)
    if isinstance(value, str):
        lowered = value.lower()
        return _BOOLEANS[lowered] if lowered in _BOOLEANS else bool(int(value))
    raise TypeError


def _string(value: object) -> str:
    if value is None or (isinstance(value, bytes | Mapping | Sequence) and not isinstance(value, str)):
        raise TypeError
    return str(value)


_SCALARS: dict[object, Callable[[object], object]] = {int: _integer, float: _number, bool: _boolean, str: _string}


def _sequence(value: object) -> Sequence[object]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    raise TypeError


def _mapping(value: object) -> Mapping[object, object]:
    if isinstance(value, Mapping):
        return value
    raise TypeError


def _plain(value: object) -> object:
    """Turn nested mappings and sequences, which may be nodes of OmegaConf, into dicts and lists."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
