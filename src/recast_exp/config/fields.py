"""How a key or an option is declared: its role, default, help, and range; and what it accepts, in words.

Keys are fields of the dataclasses in `schema`; options are fields of the dataclass of a plug-in (an adapter, a stage).
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict, TypeVar, Unpack

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recast_exp.errors import UserError
from recast_exp.files import user_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SMALLEST, LARGEST = 1e-30, 1e30
"""The size of a number that is not 0, which single precision can hold."""

LONGEST = 200
"""Characters of a value in a message."""

Default = TypeVar("Default")
Options = TypeVar("Options", bound="DataclassInstance")


class Limits(TypedDict, total=False):
    """What bounds a value, as `key` takes it."""

    ge: float | None
    gt: float | None
    le: float | None
    lt: float | None
    choices: tuple[str, ...] | None
    path: bool
    needs: str | None


class Role(enum.StrEnum):
    """What a key is for.

    Whatever depends on it is derived from here: what a task file records, what may change when a run is resumed or a
    sweep continued, what distinguishes two methods in a report.
    """

    MODEL = "model"
    """It describes the model and its data: it decides a result, and a task file records it."""
    TRAINING = "training"
    """It decides a result, but whoever uses the trained task does not need it."""
    PLACE = "place"
    """A file or folder of this machine."""
    NAME = "name"
    """What something is called."""
    CONTROL = "control"
    """How a run is carried out: device, processes, trackers, what to do."""


def key(
    role: Role,
    default: Default,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple[str, ...] | None = None,
    path: bool = False,
    needs: str | None = None,
) -> Default:
    """Declare a configuration key: role, default, help, bounds (inclusive `ge`/`le`, exclusive `gt`/`lt`) or choices.

    `path=True` marks a file or folder: such values are taken literally on the command line (spaces, `=`, any letter).
    `needs` names another field of the same dataclass; the value has no effect while that one is false or empty. With
    `needs="name=value"`, it has none while that one is another than the value.
    """
    metadata = {
        name: value
        for name, value in {
            "role": role, "help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices,
            "path": path or None, "needs": needs,
        }.items()
        if value is not None
    }  # fmt: skip
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def option(default: Default, help: str, **limits: Unpack[Limits]) -> Default:
    """Declare an option of a plug-in, a field of its dataclass: default, help, and limits as `key` takes them.

    Its role is that of the node: an adapter's options describe the model.
    """
    return key(Role.MODEL, default, help, **limits)


def type_name(field: dataclasses.Field[object]) -> str:
    """Say a key's type as a user would: `int | None` becomes `an integer or null`."""
    words = {
        "int": "an integer",
        "float": "a number",
        "bool": "true or false",
        "str": "a string",
        "list[str]": "a list of strings",
        "list[float]": "a list of numbers",
        "list[int]": "a list of integers",
        "dict[str, str]": "a mapping of strings",
        "dict[str, Any]": "a mapping",
        "None": "null",
    }
    return " or ".join(words.get(part.strip(), part.strip()) for part in str(field.type).split("|"))


def accepted(field: dataclasses.Field[object]) -> str:
    """Say what a key takes: its choices, or its type and range."""
    metadata = field.metadata
    if "choices" in metadata:
        return "one of " + ", ".join(metadata["choices"])
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    bounds = " and ".join(f"{sign} {metadata[name]}" for name, sign in signs.items() if name in metadata)
    kind = type_name(field)
    if "path" in metadata:
        kind = kind.replace("a string", "a path")
    kind, null, _ = kind.partition(" or null")
    return f"{kind} {bounds}".strip() + null


def range_problem(name: str, field: dataclasses.Field[object], value: object) -> str | None:
    """Say in one line what is wrong with the range of a value; None when it is in range, or null."""
    if value is None:
        return None
    metadata = field.metadata
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        kind = "an integer" if str(field.type).startswith("dict") else accepted(field)
        return f"{name}: expected {kind}, of 64 bits at most and signed, got {shortened(value)}"
    if "path" in metadata and isinstance(value, str):
        try:
            user_path(value)
        except UserError as error:
            return f"{name}: {error}"
    if isinstance(value, float) and not math.isfinite(value) and str(field.type).startswith("dict"):  # an entry of it
        return f"{name}: expected a finite number, got {value}"
    wrong = "choices" in metadata and value not in metadata["choices"]
    for each in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if not isinstance(each, int | float) or isinstance(each, bool):
            continue
        wrong = wrong or (
            not math.isfinite(each)
            or ("ge" in metadata and each < metadata["ge"])
            or ("gt" in metadata and each <= metadata["gt"])
            or ("le" in metadata and each > metadata["le"])
            or ("lt" in metadata and each >= metadata["lt"])
        )
        if not wrong and isinstance(each, float) and each and not SMALLEST <= abs(each) <= LARGEST:
            kind = "a number" if str(field.type).startswith("dict") else accepted(field)
            return f"{name}: expected {kind}, from {SMALLEST:g} to {LARGEST:g} in size, got {each}"
    return f"{name}: expected {accepted(field)}, got {shortened(value)}" if wrong else None


def shortened(value: object) -> str:
    """The `repr` of a value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def unmet(options: DataclassInstance, name: str) -> str | None:
    """What is not set, so that the value of an option has no effect: see `key`. None if there is none."""
    needs = {field.name: field.metadata.get("needs") for field in dataclasses.fields(options)}.get(name)
    if not needs:
        return None
    needed, _, wanted = needs.partition("=")
    found = getattr(options, needed)
    return None if (str(found) == wanted if wanted else found) else needs


_ITEMS: dict[str, tuple[type, ...]] = {"list[str]": (str,), "list[int]": (int,), "list[float]": (int, float)}


def kind_problem(name: str, field: dataclasses.Field[object], value: object) -> str | None:
    """Say in one line that a list, its items or a mapping are something else; a nested list or a `${…}` may hide it."""
    kind = str(field.type).removesuffix(" | None")
    if value is None:
        return None
    if kind.startswith("dict["):
        sound = isinstance(value, Mapping)
    elif kind in _ITEMS:
        sound = isinstance(value, list) and all(
            isinstance(each, _ITEMS[kind]) and not isinstance(each, bool) for each in value
        )
    else:
        return None
    return None if sound else f"{name}: expected {accepted(field)}, got {shortened(value)}"


def build(kind: type[Options], values: Mapping[str, object], prefix: str, owner: str) -> Options:
    """Make a plug-in's options from a node of the configuration.

    Args:
        kind: The dataclass of its options.
        values: Name → value.
        prefix: What messages put before a name: `stage.`.
        owner: What the options belong to, for messages: `stage=compare`.

    Raises:
        UserError: If options are unknown, of the wrong type or out of range. One line for all of them.
    """
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}
    node = OmegaConf.structured(kind)
    OmegaConf.set_readonly(node, False)  # that of a frozen dataclass is
    problems = []
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            listed = ", ".join(known) or "no options"
            problems.append(f"{prefix}{name}: unknown option; {owner} takes {listed}{hint}")
            continue
        try:
            # The command line reads true and false; of a string, they are a word like any other
            node[name] = str(value).lower() if isinstance(value, bool) and known[name].type in ("str", str) else value
            problem = range_problem(f"{prefix}{name}", known[name], node[name])
        except OmegaConfBaseException:
            problem = f"{prefix}{name}: expected {accepted(known[name])}, got {value!r}"
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(*problems)
    made = OmegaConf.to_object(node)
    assert isinstance(made, kind)
    return made
