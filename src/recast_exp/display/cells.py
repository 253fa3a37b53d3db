"""Texts of files and users in a terminal's tables."""

from __future__ import annotations

from rich.markup import escape

from recast_exp.errors import printable


def cell(text: str) -> str:
    """A text as it stands: rich takes nothing of it for markup, and the terminal nothing for a command."""
    return escape(printable(text))
