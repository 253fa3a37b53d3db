"""What the README shows must be what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recast_exp.cli.check import CommandLine, check
from recast_exp.config.compose import Composer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ python -m recast_exp(.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "…" not in command and "--help" not in command])
def test_commands_are_accepted(command: str) -> None:
    typed = shlex.split(command, comments=True)
    line = CommandLine(tuple(text for text in typed if text != "-m"), multirun="-m" in typed, inputs=False)
    assert check(line).wrong == []


def test_options_named_in_the_table_exist() -> None:
    groups = Composer().groups()
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 5
    for names, options in rows:
        known = {option for name in re.findall(r"`(\w+)`", names) for option in groups[name]}
        named = set(re.findall(r"`(\w+)`", options))
        assert named <= known, names
        assert known - {"null"} <= named or "seed" in names, names


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@@|TODO|FIXME", README)
