"""Every bad input is refused in one line that a person understands; nothing is written, and nothing is lost.

`make attack` tries the whole table; the suite tries every tenth case.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from attack.cases import Case, all_cases
from attack.materials import QUICK, Materials, make
from recast_exp.cli import main as cli
from recast_exp.errors import RecastError

CASES = all_cases()
EVERY = 10


def test_the_table_is_long() -> None:
    counts = Counter(case.kind for case in CASES)
    assert len(CASES) >= 500 and min(counts.values()) >= 8, counts
    assert len({(case.kind, case.name) for case in CASES}) == len(CASES)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The originals, and the cache they were made with."""
    folder, cache = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("cache_of_attacks")
    make(folder, cache)
    return folder, cache


def contents(folder: Path) -> dict[str, str]:
    """The hash of each file below a folder; of a folder, nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.suffix not in (".log", ".lock") and path.name != "recast_exp.log"
    }


def test_the_attack(
    case: Case,
    good: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at = Materials(good[0], tmp_path / "inputs", good[1])
    at.here.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if case.call is not None:
        with pytest.raises(RecastError) as error:
            case.call(at)
        assert case.says in str(error.value) and "\n" not in str(error.value), error.value
        return
    assert case.typed is not None
    given = [str(text) for text in case.typed(at)]
    keys = {text.partition("=")[0] for text in given}
    base = [text for text in (*QUICK, f"cache_dir={at.cache}") if text.partition("=")[0] not in keys]
    if any(text.startswith("resume=") for text in given):
        base = []
    before = contents(tmp_path)
    try:
        code = cli.run([*base, *given])
    except SystemExit as ended:  # of a job
        code = ended.code if isinstance(ended.code, int) else 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == case.code, errors
    assert errors and len(errors) <= 3, errors
    assert any(case.says in line for line in errors), errors
    assert not re.search(r"Traceback|<class|object at 0x", "".join(errors)), errors
    if case.kind != "images":  # stage=check has a result: which images cannot be used
        assert contents(tmp_path) == before
