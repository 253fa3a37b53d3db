"""What `task=` names, before any file is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from recast_exp.runs.task_header import task_files


def test_task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert task_files("a.safetensors") == [Path("a.safetensors")]
    assert task_files("[a b.safetensors, 'c.safetensors']") == [Path("a b.safetensors"), Path("c.safetensors")]
    assert task_files('["a.safetensors", ]') == [Path("a.safetensors")]
    assert task_files("[a,b]") == [Path("a"), Path("b")]
    assert task_files("[a,'XX']") == [Path("a"), Path("XX")]
    assert task_files("[a.safetensors") == [Path("[a.safetensors")]
    assert task_files("a.safetensors]") == [Path("a.safetensors]")]
    assert task_files("") == []
    Path("[a,b]").touch()
    assert task_files("[a,b]") == [Path("[a,b]")]
