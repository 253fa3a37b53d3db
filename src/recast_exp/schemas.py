"""Files of JSON and YAML, read whole against a schema before anything of them is used.

Whoever sends a file may have written anything into it. What is read here is bounded in its size and depth, has no NaN,
and has the types that its schema, a `TypedDict` beside the code that writes the file, declares. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml  # type: ignore[import-untyped, unused-ignore]

from recast_exp.errors import MissingInputError, UserError, one_line

LARGEST = 256 * 2**20
"""Bytes of a file. A sweep of ten thousand jobs takes a fifth of that."""
DEPTH = 100
NODES = 1_000_000
"""Of a YAML file, each alias counted as often as it is used."""

T = TypeVar("T")


def read_json(path: Path, schema: type[T], what: str) -> T:
    """Read a JSON file.

    Args:
        path: The file.
        schema: The type of its content. Entries that a `TypedDict` does not declare are left out.
        what: What the file should be, for the message: `the record of a job`.

    Raises:
        MissingInputError: If there is no such file.
        UserError: If it cannot be read, or does not fit the schema.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: expected {what}, got no file")
    try:
        return decode(path, schema)
    except ValueError as error:
        raise UserError(f"{path}: expected {what}, got a damaged or different file ({error})") from error


def decode(path: Path, schema: type[T]) -> T:
    """As `read_json`, for callers with a line of their own.

    Raises:
        ValueError: If the file is missing, cannot be read, or does not fit the schema; the text says why, in one line.
    """
    try:
        return parse(read_regular(path).decode(), schema)
    except OSError as error:
        raise ValueError(error.strerror or one_line(error)) from error


def read_regular(path: Path, largest: int = LARGEST) -> bytes:
    """Read a whole file, which must be one: a pipe would wait for ever, and a device never ends.

    Args:
        path: The file.
        largest: Bytes that it may have.

    Raises:
        ValueError: If it is no regular file, or is larger.
        OSError: If it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{max(status.st_size, len(content)):,} bytes, where {largest:,} are the limit")
    return content


def parse(text: str, schema: type[T]) -> T:
    """Parse the text of a JSON file.

    Raises:
        ValueError: If it is no JSON, or does not fit the schema; the text says why, in one line.
    """
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(one_line(error, limit=120)) from error
    return checked(content, schema)


def checked(content: object, schema: type[T]) -> T:
    """What has been parsed, once it fits a schema.

    Raises:
        ValueError: If it does not; the text names the entry: `seed: expected an integer, got text`.
    """
    try:
        return msgspec.convert(content, type=schema, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(_worded(one_line(error, limit=200))) from error


_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "str": "text",
    "int": "an integer",
    "float": "a number",
    "int | float": "a number",
    "int | array": "an integer or a list",
    "str | array": "text or a list",
    "bool": "true or false",
}
_HASH = re.compile(r"text matching regex '.*\[0-9a-f\]\{64\}.*'")


def _worded(said: str) -> str:
    """Msgspec's ``Expected `int`, got `str` - at `$.seed` `` as `seed: expected an integer, got text`."""
    said, _, place = said.partition(" - at ")
    place = place.strip("`").removeprefix("$").removeprefix(".")
    if missing := re.fullmatch("Object missing required field (`.*`)", said):
        said = f"the entry {missing[1]} is missing"
    else:
        said = re.sub("`([^`]*)`", _named, said[:1].lower() + said[1:])
        said = _HASH.sub("64 hexadecimal digits", said)
    return f"{place}: {said}" if place else said


def _named(types: re.Match[str]) -> str:
    kind, null, _ = types[1].partition(" | null")
    return _WORDS.get(kind, types[0]) + (" or null" if null else "")


def check_yaml(path: Path) -> None:
    """Refuse a YAML file that would take too much memory or time to load, such as one of nested aliases.

    Raises:
        UserError: If the file cannot be read, is no YAML, or holds more than is read.
    """
    try:
        _count(read_regular(path).decode())
    except yaml.MarkedYAMLError as error:
        line = f": line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: expected YAML, got a damaged file ({one_line(error, limit=120)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _count(text: str) -> None:
    sizes: dict[str, int] = {}
    open_nodes: list[list[Any]] = [[None, 0]]  # the anchor of each collection, and the number of nodes in it so far
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            count = sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count = 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > DEPTH:
                raise ValueError(f"it is nested more than {DEPTH} times")
            continue
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_nodes.pop()
            if anchor:
                sizes[anchor] = count
        else:
            continue
        open_nodes[-1][1] += count
        if open_nodes[-1][1] > NODES:
            raise ValueError(f"it has more than {NODES:,} values, aliases counted as often as they are used")


_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


def _integer(text: str) -> int:
    # Before it is read: a text of thousands of digits takes long
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"{text[:20]} is too large for an integer")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number
