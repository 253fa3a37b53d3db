"""The tables in the terminal: their titles, and what they count."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from recast_exp.display import console
from recast_exp.runs.results import Results

METRICS = {
    "probe/val/accuracy": 0.7, "probe/test/accuracy": 0.6, "val/accuracy": 0.9, "test/accuracy": 0.85, "test/loss": 0.5,
    "epoch": 3.0, "epochs": 5.0, "seconds": 12.4, "images_per_second": 99.0, "device": "cpu (1 threads)",
}  # fmt: skip
PARAMETERS = {
    "coefficients": 48, "adapter": 1000, "backbone_trained": 0, "buffers": 0, "head": 485, "task_specific": 1048,
    "task_file_bytes": 4900, "templates": 331_776, "frozen": 1_016_928,
}  # fmt: skip


TITLE = "vit_att + melo on cub · vit_small with a · b.safetensors · seed 7"


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"[\s─]+", " ", capsys.readouterr().out)


def test_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_adaptation(TITLE, "vit_att + melo", "best", METRICS, PARAMETERS)
    out = shown(capsys)
    assert out.startswith("vit_att + melo on cub · vit_small with a · b.safetensors · seed 7 parameters head val test ")
    assert "linear probe 0 485 70.0 % 60.0 % vit_att + melo 1,048 485 90.0 % 85.0 %" in out
    assert "Task: 48 coefficients + 1,000 adapter + 485 head, 4.9 kB task file." in out
    assert "Shared: 331,776 template parameters, 1,016,928 frozen." in out
    assert "Epoch 3 of 5 is reported (best); 12 s of training" in out


@pytest.mark.parametrize("columns", [1, 20, 80])
def test_a_narrow_terminal_loses_no_number(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    console.show_adaptation(TITLE, "vit_att + melo", "best", METRICS, PARAMETERS)
    assert "linear probe 0 485 70.0 % 60.0 % vit_att + melo 1,048 485 90.0 % 85.0 %" in shown(capsys)


def test_a_task_file(capsys: pytest.CaptureFixture[str]) -> None:
    images = {"train": 1036, "val": 12, "test": 359}
    console.show_evaluation(TITLE, Path("t.safetensors"), METRICS, PARAMETERS, images)
    out = shown(capsys)
    assert "seed 7, from t.safetensors test/accuracy test/loss 85.0 % 0.5000" in out
    assert "Test split: 359 images; 1,048 others are training and validation images. Task:" in out
    console.show_evaluation(TITLE, Path("t.safetensors"), METRICS | {"test/accuracy_top5": 0.99}, PARAMETERS, images)
    assert "85.0 % 99.0 % 0.5000" in shown(capsys)


def test_a_part_of_the_test_images_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    line, part = "Only 64 of 359 test images were tested", {"test/images": 64, "test/images_left_out": 295}
    console.show_adaptation(TITLE, "vit_att", "best", METRICS, PARAMETERS)
    assert line not in shown(capsys)
    console.show_adaptation(TITLE, "vit_att", "best", METRICS | part, PARAMETERS)
    assert line in shown(capsys)
    console.show_evaluation(TITLE, Path("t"), METRICS | part, PARAMETERS, {"train": 1, "val": 1, "test": 359})
    assert line in shown(capsys)


def test_a_comparison_of_several_seeds_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"task_specific": 48, "task_bits": 1536, "runs": 3, "seconds": 5.0}
    row |= {f"{part}/accuracy{spread}": 0.5 for part in ("val", "test") for spread in ("", "/spread")}
    console.show_comparison(TITLE.rpartition(" · ")[0], {"RECAST-Att": row})
    out = shown(capsys)
    assert out.startswith("vit_att + melo on cub · vit_small with a · b.safetensors method params bytes ")
    assert "RECAST-Att 48 192 50.0 ± 50.0 50.0 ± 50.0 5 s" in out


def test_brackets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.show_sweep(tmp_path / "s[/x] [old]", {"recast.targets=[*.mlp.fc1]": [Results(METRICS, PARAMETERS)]})
    out = capsys.readouterr().out
    assert "s[/x] [old]" in out and "[*.mlp.fc1]" in out


def test_what_a_terminal_would_obey_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_predictions("x", 1, 1, {"a\x1b[31m": {"b\x1b]0;title\x07[bold]": 1}})
    console.show_bad({"c\x1b[2J.png": "d\x9b"})
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b"}
    for text in (r"a\x1b[31m", r"b\x1b]0;title\x07[bold]", r"c\x1b[2J.png", r"d\x9b"):
        assert text in out
