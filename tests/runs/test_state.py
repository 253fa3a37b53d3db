"""States of jobs: one vocabulary, in which files of earlier versions are read."""

from __future__ import annotations

import json

import pytest

from recast_exp.runs.state import State


@pytest.mark.parametrize(
    ("text", "reason", "state"),
    [
        *((state.value, None, state) for state in State),
        ("not started", None, State.WAITING),
        ("not begun", None, State.WAITING),
        ("skipped", "pruned after epoch 2 of 5 at 40.0 % validation accuracy", State.PRUNED),
        ("skipped", "adapter: melo does not fit ResNet", State.SKIPPED),
        ("failed", "pruned after epoch 2", State.FAILED),
        ("lost", None, State.DAMAGED),
    ],
)
def test_recorded_words(text: str, reason: str | None, state: State) -> None:
    assert State.of(text, reason) is state


def test_a_state_is_its_word() -> None:
    assert json.dumps({"state": State.RUNNING}) == '{"state": "running"}'
    assert f"{State.PRUNED}" == "pruned"
    assert "failed" in {State.FAILED}
