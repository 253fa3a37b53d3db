"""The README fits on a screen, and the program accepts the commands that it shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from recast_exp.cli.check import CommandLine, check

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ python -m recast_exp(.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "…" not in command and "--help" not in command])
def test_commands_are_accepted(command: str) -> None:
    typed = shlex.split(command, comments=True)
    line = CommandLine(tuple(text for text in typed if text != "-m"), multirun="-m" in typed, inputs=False)
    assert check(line).wrong == []


def test_it_is_short_and_shows_commands() -> None:
    assert len(README.splitlines()) <= 80
    assert len(COMMANDS) >= 6


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"@@|TODO|FIXME", README)
