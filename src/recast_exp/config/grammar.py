"""From what was typed to what Hydra's grammar accepts: seeds, paths, and values with letters the grammar refuses.

Every rewriting leaves its own result alone, so a command line that was rewritten once (as the processes of one
distributed run, or a resumed run, see it) passes through unchanged.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable
from types import NoneType

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from recast_exp.config.schema import fields
from recast_exp.files import user_path

MAX_JOBS = 10_000
"""Jobs of one sweep, beyond which a range is taken for a slip of the keyboard."""

PATH_KEYS = frozenset(
    {name for name, field in fields() if "path" in field.metadata} | {"hydra.run.dir", "hydra.sweep.dir"}
)

MAPPING_KEYS = frozenset(name for name, field in fields() if "dict[" in str(field.type))
"""Keys whose entries may have any name, so that Hydra has to be told to take new ones."""

TEXT_KEYS = frozenset(
    {name for name, field in fields() if str(field.type).removesuffix(" | None") in ("str", "list[str]")} - PATH_KEYS
)

_TYPED = re.compile(r"(?P<key>[^=]+)=(?P<value>.*)", re.DOTALL)
_SWEEP_CALL = re.compile(r"(choice|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_parser = OverridesParser.create()


def mapping_of(key: str) -> str:
    """The mapping that a dotted key leads into (adapter.arguments.r into adapter); empty where there is none."""
    parents = itertools.accumulate(key.split(".")[:-1], lambda path, name: f"{path}.{name}")
    return next((parent for parent in parents if parent in MAPPING_KEYS), "")


@functools.cache
def parse(text: str) -> Override | None:
    """Parse an override with Hydra's grammar; None where the grammar refuses it."""
    try:
        return _parser.parse_override(text)
    except (HydraException, ValueError, RecursionError):  # ValueError: a number with too many digits for Python
        return None


def key(text: str) -> str:
    """The key of an override, without its +."""
    return text.partition("=")[0].lstrip("+~")


def value(text: str) -> object:
    """The value of an override with a single one."""
    override = parse(text)
    assert override is not None, text
    found = override.value()
    return found.text if isinstance(found, QuotedString) else found


def quote(text: str) -> str:
    """Quote `text` for Hydra's grammar."""
    return QuotedString(text, Quote.double).with_quotes()


def short(value: str) -> str:
    """A value as people read it: a number with four digits that count, anything else without its quotes."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value.strip("\"'")


def _escaped(before: str) -> bool:
    """Whether a quote after this text is a letter: two backslashes stand for one, and a single one for the quote."""
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def split(value: str, *, brackets: bool = True) -> list[str]:
    """Split at the commas outside quotes and `${...}` and, with `brackets`, outside any other bracket.

    A quote counts only where a part begins with it: an apostrophe within a word is a letter.
    """
    parts: list[str] = []
    closing: list[str] = []
    start = 0
    for position, letter in enumerate(value):
        if closing and letter == closing[-1]:
            if letter not in "'\"" or not _escaped(value[:position]):
                closing.pop()
        elif closing and closing[-1] in "'\"":
            continue
        elif letter in "'\"" and not value[start:position].strip():
            closing.append(letter)
        elif letter in _BRACKETS and (brackets or closing or value[position - 1 : position + 1] == "${"):
            closing.append(_BRACKETS[letter])
        elif letter == "," and not closing:
            parts.append(value[start:position].strip())
            start = position + 1
    return [*parts, value[start:].strip()]


def rewrite(typed: Iterable[str], *, multirun: bool) -> list[str]:
    """Rewrite each `key=value` for Hydra; what cannot be helped stays as it is, for the check to report.

    Args:
        typed: The overrides as typed.
        multirun: Whether commas separate the values of a sweep.
    """
    return [_rewrite(text, multirun) for text in typed]


def _rewrite(text: str, multirun: bool) -> str:
    match = _TYPED.fullmatch(text)
    if match is None or not match["value"]:
        return text
    key, value = match["key"], match["value"]
    bare = key.lstrip("+")
    if mapping_of(bare) or (bare in MAPPING_KEYS and value.startswith("{")):
        return f"++{bare}={_plain(value, multirun)}"
    if key == "seed":
        return f"{key}={_seed(value)}"
    if key in ("experiment", "method"):
        return f"{key}={','.join(quote(part) if part.lower() == 'null' else part for part in split(value))}"
    if bare in PATH_KEYS:
        return f"{key}={_path(value, multirun and not key.startswith('hydra.'))}"  # Hydra's own keys are not swept
    if bare in TEXT_KEYS:
        value = _text(value, multirun)
    return f"{key}={_plain(value, multirun)}"


def _seed(value: str) -> str:
    override = parse(f"seed={value}")
    if override is None:
        return quote(value)
    if override.is_interval_sweep() or "glob(" in value:
        return value
    try:
        names = [quote(_number(element)) for element in _elements(override)]
    except ValueError:  # range(1,5,0)
        return value
    return ",".join(names) or value


def _elements(override: Override) -> list[object]:
    """The values of a seed, of which a list is a sweep too."""
    if override.is_sweep_override():
        return list(itertools.islice(override.sweep_iterator(), MAX_JOBS + 1))
    value = override.value()
    return value if isinstance(value, list) else [value]


def _number(element: object) -> str:
    text = element.text if isinstance(element, QuotedString) else str(element)
    return str(int(text)) if re.fullmatch(r"[+-]?\d{1,20}", text) else text


def sweep_values(override: Override) -> list[str]:
    """The values of one override as text of Hydra's grammar: several of a sweep, else one. At most `MAX_JOBS` + 1."""
    if override.is_interval_sweep():
        value = override.value()
        return [str(value.start), str(value.end)]  # type: ignore[union-attr]
    if override.is_sweep_override():
        return list(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    return [override.get_value_element_as_str()]


def _path(value: str, multirun: bool) -> str:
    if multirun and _SWEEP_CALL.fullmatch(value):
        return value
    is_list = value.startswith("[") and value.endswith("]") and len(split(value)) == 1  # of task files
    parts = split(value, brackets=False) if multirun and not is_list else [value]
    return ",".join(part if part.lower() == "null" or _is_quoted(part) else quote(_expanded(part)) for part in parts)


def _expanded(path: str) -> str:
    """Expand `~`, which shells leave alone behind a `=`."""
    return str(user_path(path)) if path.startswith("~") else path


def _is_quoted(text: str) -> bool:
    if text[:1] not in ("'", '"'):
        return False
    override = parse(f"key={text}")
    return override is not None and not override.is_sweep_override()


def _text(value: str, multirun: bool) -> str:
    """Quote names that Hydra would take for numbers: a class `10_000` would become `10000`, and `1e3` `1000.0`."""
    return ",".join(map(_named, split(value) if multirun else [value]))


def _named(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        return "[" + ",".join(_quoted_if_changed(part, (int, float, NoneType)) for part in split(text[1:-1])) + "]"
    return _quoted_if_changed(text, (int, float))


def _quoted_if_changed(text: str, kinds: tuple[type, ...]) -> str:
    override = parse(f"key={text}")
    if override is None or override.is_sweep_override():
        return text
    value = override.value()
    return quote(text) if isinstance(value, kinds) and str(value) != text and text else text


def _plain(value: str, multirun: bool) -> str:
    if parse(f"key={value}"):
        return value
    if value.startswith("[") and value.endswith("]"):
        return "[" + ",".join(_quoted_if_refused(part) for part in split(value[1:-1])) + "]"
    parts = split(value) if multirun else [value]
    return ",".join(_quoted_if_refused(part) for part in parts)


def _quoted_if_refused(text: str) -> str:
    return text if parse(f"key={text}") else quote(text)


def without_start(overrides: Iterable[str]) -> list[str]:
    """Overrides without `launcher=...` and `resume=...`: how a job was started is no part of what it did."""
    return [text for text in overrides if not text.lstrip("+").startswith(("launcher=", "resume="))]
