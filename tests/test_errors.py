"""Errors on one line."""

from __future__ import annotations

from recast_exp.errors import UserError, first_line, one_line


def test_an_error_on_one_line() -> None:
    error = ValueError("\n one  thing\n\tand another\n")
    assert (one_line(error), first_line(error)) == ("one thing and another", "one  thing")
    assert one_line(error, limit=5) == "one t"
    assert (one_line(OSError()), first_line(OSError(" \n"))) == ("OSError", "OSError")


def test_names_of_others_keep_to_the_line_and_do_not_move_the_terminal() -> None:
    error = UserError("classes: got 'a\nb\tc'", "name: \x1b[31mred, \udcff, ü, 猫")
    assert str(error) == "classes: got 'a b c'; name: \\x1b[31mred, \\udcff, ü, 猫"
