"""The keys: what each is for, the nearest name for a slip of the keyboard, and what is wrong with a value."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.config import grammar, presets
from recast_exp.config.fields import Role, accepted, range_problem, shortened
from recast_exp.config.schema import Config, fields

FIELDS = dict(fields())
SECTIONS = {name.rpartition(".")[0] for name in FIELDS} - {""}


def role_of(key: str) -> Role | None:
    """What a dotted key is for; None for one that this version does not know."""
    field = field_of(key)
    return Role(field.metadata["role"]) if field else None


def decides(key: str) -> bool:
    """Whether a result depends on a key. All others may change when a run is resumed or a sweep is continued."""
    return role_of(key) in (Role.MODEL, Role.TRAINING)


def is_recorded(key: str) -> bool:
    """Whether a task file records a key, and may set it: what describes the model, and the names in its sections."""
    return role_of(key) is Role.MODEL or (role_of(key) is Role.NAME and "." in key)


def recorded(settings: Config) -> dict[str, object]:
    """The part of a configuration that a task file records, as nested mappings.

    What has its default is left out, so a default of such a key must never change: `with_defaults` puts it back.
    """
    content: dict[str, object] = {}
    for key, value in leaves(dataclasses.asdict(settings)):
        if is_recorded(key) and value != default(key) and key != "dataset.backbones":  # of which model.backbone is one
            section, _, name = key.rpartition(".")
            node = content.setdefault(section, {}) if section else content
            assert isinstance(node, dict)
            node[name] = value
    return content


def with_defaults(found: Mapping[str, object]) -> dict[str, object]:
    """The dotted keys of `recorded`, with the defaults of all that it has left out."""
    return {key: default(key) for key in FIELDS if is_recorded(key)} | dict(found)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The keys on which results depend and whose values differ.

    Args:
        before: Dotted key → value, maybe of an earlier version.
        now: The same of this version.

    Returns:
        Key → both values. A key that one of them lacks has its default there; one that this version does not know is
        left out.
    """
    found = {}
    for key in dict.fromkeys([*now, *before]):
        if decides(key):
            pair = before.get(key, default(key)), now.get(key, default(key))
            if whole(key, pair[0]) != whole(key, pair[1]):
                found[key] = pair
    return found


def whole(key: str, value: object) -> object:
    """The options of a plug-in with those of its preset that are missing, as an earlier version did not have them."""
    if not isinstance(value, Mapping) or not isinstance(name := value.get("name"), str):
        return value
    return {**presets.options_of(key, name), **value}


def default(key: str) -> object:
    """The default of a key; None for one that this version does not know."""
    field = FIELDS.get(key)
    if field is None:
        return None
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def field_of(key: str) -> dataclasses.Field[object] | None:
    """The schema's field of a dotted key; an entry of a mapping has the mapping's."""
    return FIELDS.get(key) or FIELDS.get(mapping_of(key))


def is_open(key: str) -> bool:
    """Whether `key` is a mapping, or an entry of one such as dataset.backbones.vit: there any name will do."""
    return (key if key in FIELDS else mapping_of(key)) in grammar.MAPPING_KEYS


def mapping_of(key: str) -> str:
    """The mapping that a dotted key leads into; empty where there is none."""
    return grammar.mapping_of(key)


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that were probably meant: nearly the same, or the same behind another dot. Nearest first."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return close
    last = name.rpartition(".")[2]
    same = [other for other in names if other.rpartition(".")[2] == last and other != name]
    if same:
        return difflib.get_close_matches(name, same, n=3, cutoff=0.0)
    ends = {other.rpartition(".")[2]: other for other in reversed(names)}
    return [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.7)]


def unknown(key: str, groups: Iterable[str]) -> str:
    """The line for a key that does not exist."""
    if not key:
        return "expected KEY=VALUE, got a value without a key; `--cfg job` prints all keys"
    meant = nearest(key, [*groups, *FIELDS, *sorted(SECTIONS)])
    hint = f"did you mean {' or '.join(meant)}?" if meant else "`--cfg job` prints all keys"
    return f"{key}: unknown key; {hint}"


def unknown_option(group: str, option: str, options: Iterable[str]) -> str:
    """The line for an option that a group does not have."""
    options = sorted(options)
    if group == "seed":
        return f"seed: expected {accepted(FIELDS['seed'])}, got {option!r}"
    meant = nearest(option, options)
    listed = ", ".join([*meant, *(name for name in options if name not in meant)])
    hint = f"; did you mean {meant[0]}?" if meant else ""
    if group == "experiment":
        hint += "; --config-dir DIR adds those of DIR/experiment/"
    return f"{group}: expected one of {listed}, got {option!r}{hint}"


def value_problems(key: str, value: object) -> Iterator[str]:
    """Check the type and range of one value against the schema, apart from all others.

    Args:
        key: A dotted key that exists, or a section together with a mapping of its keys.
        value: The value as Hydra's grammar reads it. One with an interpolation is not checked: it depends on others.
    """
    if key in SECTIONS:
        if isinstance(value, dict):
            for name, inner in value.items():
                full = f"{key}.{name}"
                if full in SECTIONS or field_of(full):
                    yield from value_problems(full, inner)
                else:
                    yield unknown(full, ())
        else:
            inside = ", ".join(name for name in FIELDS if name.rpartition(".")[0] == key)
            yield f"{key}: expected its keys to be set one by one ({inside}), got {value!r}"
        return
    field = field_of(key)
    assert field is not None, key
    if "${" in str(value):
        return
    try:
        if _is_lossy(field, value):
            raise ValueError
        schema = _schema()
        OmegaConf.update(schema, key, value, force_add=is_open(key))
        converted = OmegaConf.select(schema, key)
        as_given = isinstance(value, int | float) and "str" not in str(field.type)
        problem = range_problem(key, field, value if as_given else converted)
    except (OmegaConfBaseException, ValueError, OverflowError):
        problem = f"{key}: expected {accepted(field)}, got {shown(value)}"
    if problem:
        yield problem


def shown(value: object) -> str:
    """A value as a user would type it, strings in quotes; the start of a long one."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else shortened(value)


def _is_lossy(field: dataclasses.Field[object], value: object) -> bool:
    """Whether OmegaConf would take the value by cutting it: 2.5 as the integer 2, or 2 as true."""
    if "bool" in str(field.type):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, float) and "int" in str(field.type) and not value.is_integer()


def leaves(nested: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Flatten sections to dotted keys; a mapping that is a key's value stays whole."""
    for name, value in nested.items():
        full = f"{prefix}{name}"
        if full in SECTIONS and isinstance(value, Mapping):
            yield from leaves(value, f"{full}.")
        else:
            yield full, value


@functools.cache
def _schema() -> DictConfig:
    """One configuration to try values on; each key is judged alone, so that what was set before does not matter."""
    schema = OmegaConf.structured(Config)
    assert isinstance(schema, DictConfig)
    return schema
