"""`python -m recast_exp doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest

from recast_exp.cli import doctor
from recast_exp.cli import main as cli


def test_the_machine_is_described_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) >= {"recast_exp", "libraries", "extras", "devices", "cache", "templates", "locks", "a run"}
    assert "torch 2" in lines["libraries"] and "peft yes" in lines["extras"]
    for part in ("templates", "locks", "a run"):
        assert "work" in lines[part] and "FAILED" not in lines[part]


def test_what_fails_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(folder: Path, command: object) -> str:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(doctor, "TESTS", {"templates": broken})
    assert cli.run(["doctor"]) == 1
    assert "FAILED (RuntimeError: no such thing)" in capsys.readouterr().out
    assert cli.run(["doctor", "--no-test"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_another_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor", "model=vit_att"]) == 2
    assert capsys.readouterr().err == "error: doctor: expected nothing or --no-test, got model=vit_att\n"
