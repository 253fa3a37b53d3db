"""Errors on one line."""

from __future__ import annotations

from recast_exp.errors import first_line, one_line


def test_an_error_on_one_line() -> None:
    error = ValueError("\n one  thing\n\tand another\n")
    assert (one_line(error), first_line(error)) == ("one thing and another", "one  thing")
    assert one_line(error, limit=5) == "one t"
    assert (one_line(OSError()), first_line(OSError(" \n"))) == ("OSError", "OSError")
