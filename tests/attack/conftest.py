"""The cases of an attack: all with `--all-cases`, else a tenth of them."""

from __future__ import annotations

import pytest

from attack.test_attack import CASES, EVERY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hand the chosen cases to the test that takes one."""
    if "case" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_attack"):
        chosen = CASES if metafunc.config.getoption("--all-cases") else CASES[::EVERY]
        metafunc.parametrize("case", chosen, ids=[f"{case.kind}: {case.name}"[:80] for case in chosen])
