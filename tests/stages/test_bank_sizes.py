"""Banks that are smaller than the weights they replace: a comparison of sizes, and a run with calibrated templates."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recast_exp import stages
from recast_exp.config.schema import Config
from recast_exp.files import cache_folder
from recast_exp.models.loading import load_task
from support.running import run_stage

Compose = Callable[..., Config]
SWEEP = ("model=vit_att", "recast.num_groups=4", "mimicry.images=32", "stage=reconstruct", "stage.sweep=true")


def test_sizes_side_by_side(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny(*SWEEP, "stage.dtypes=[float32,int8]", "trainer.limit_batches=null")
    metrics = run_stage(settings, tmp_path)
    found = json.loads((tmp_path / "bank_sizes.json").read_text())
    rows = {(row["num_templates"], row["solver"], row["dtype"]): row for row in found["banks"]}
    assert set(rows) == {
        (n, s, d) for n in (1, 2, 3) for s in ("closed_form", "calibrated") for d in ("float32", "int8")
    }
    for number in (1, 2, 3):
        whole, small = (rows[number, "closed_form", dtype] for dtype in ("float32", "int8"))
        assert whole["share"] == pytest.approx(number / 3)
        assert whole["share"] / 4 < small["share"] < whole["share"] / 3  # integers and their scales
    for number in (1, 2):
        plain, fitted = (rows[number, solver, "float32"] for solver in ("closed_form", "calibrated"))
        assert fitted["output_error"] < plain["output_error"]
        assert fitted["feature_similarity"] > plain["feature_similarity"]
    exact = rows[3, "closed_form", "float32"]
    assert exact["output_error"] < 1e-4
    assert exact["head_accuracy"] == found["pretrained"] == metrics["val/accuracy"]
    assert 0 < rows[3, "closed_form", "int8"]["output_error"] < 0.2
    with (tmp_path / "bank_sizes.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    assert (tmp_path / "plots" / "bank_sizes.png").stat().st_size > 5000
    assert "With the pretrained weights, the head has" in capsys.readouterr().out


def test_a_run_with_calibrated_templates_and_its_task_file(tiny: Compose, tmp_path: Path) -> None:
    typed = ("model=vit_att", "mimicry=calibrated", "mimicry.images=32", "recast.num_templates=1")
    settings = tiny(*typed, "recast.template_dtype=bfloat16")
    metrics = run_stage(settings, tmp_path / "run")
    assert metrics["mimicry/relative_error"] > 0.1
    task = load_task(tmp_path / "run" / "task.safetensors")
    assert task.origin is not None
    assert (task.origin.solver, task.origin.dtype) == ("calibrated", "bfloat16")
    counts = json.loads((tmp_path / "run" / "parameters.json").read_text())
    assert counts["template_bits"] == 16 * counts["templates"]
    # It cannot be made from the weights, but is in the cache
    assert (cache_folder(settings.cache_dir) / "banks" / f"{task.bank}.safetensors").is_file()
    again = dataclasses.replace(settings, task=str(task.path), stage={"name": "evaluate"})
    assert run_stage(again, tmp_path / "again")["test/accuracy"] == metrics["test/accuracy"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solvers": ["magic"]}, "stage.solvers: expected some of autoencoder, calibrated, closed_form, gradient"),
        ({"dtypes": ["int4"]}, "stage.dtypes: expected some of float32, bfloat16, int8, got 'int4'"),
        ({"sizes": [0]}, "stage.sizes: expected integers ≥ 1, got 0"),
    ],
)
def test_what_cannot_be_compared(tiny: Compose, options: dict[str, object], expected: str) -> None:
    (line,) = stages.from_config({"name": "reconstruct", **options}).problems(tiny("model=vit_att"))
    assert line.startswith(expected)
