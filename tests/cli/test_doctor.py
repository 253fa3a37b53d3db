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


def test_without_a_folder_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(**_: object) -> None:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", none)
    assert cli.run(["doctor"]) == 1
    assert "self-test:     FAILED (No usable temporary directory found)" in capsys.readouterr().out


def test_variables_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RECAST_EXP_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "a\nb")
    assert cli.run(["doctor", "--no-test"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["data_dir"].strip() == f"{tmp_path}, there"
    assert f"RECAST_EXP_DATA={tmp_path}, HF_HOME=a b" in lines["environment"]


@pytest.mark.parametrize("name", ["${seed}", "a ${oc.env:HOME}"])
def test_a_current_folder_that_hydra_would_replace(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert cli.run(["trainer.max_epochs=1"]) == 2
    assert capsys.readouterr().err.startswith("error: the current folder: expected a path without ${, got ")
    assert not list((tmp_path / name).iterdir())
