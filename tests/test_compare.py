"""`stage=compare` on a few methods, a few steps each."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from PIL import Image

from helpers import assert_one_line
from recast_exp import adapters, stages
from recast_exp.errors import UserError
from recast_exp.stages import compare

Compose = Callable[..., DictConfig]
METHODS = ["linear probe", "RECAST", "RECAST + piggyback"]
TYPED = ("stage=compare", "model=vit_att", "stage.seeds=[1,2]", f"stage.methods={json.dumps(METHODS)}")


def test_methods_beside_each_other(
    tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = stages.run(tiny(*TYPED), tmp_path)
    summary = json.loads((tmp_path / "comparison.json").read_text())
    assert list(summary) == METHODS
    for name, row in summary.items():
        runs = [tmp_path / "runs" / name.replace(" ", "_") / str(seed) for seed in (1, 2)]
        accuracies = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in runs]
        assert row["test/accuracy"] == metrics[f"{name}/test/accuracy"] == pytest.approx(statistics.fmean(accuracies))
        assert row["test/accuracy/spread"] == pytest.approx(statistics.stdev(accuracies))
        assert row["seeds"] == 2
    assert summary["linear probe"]["task_specific"] == 0
    assert summary["RECAST"]["task_specific"] == 48
    piggyback = summary["RECAST + piggyback"]
    assert piggyback["task_bits"] == piggyback["task_specific"] - 48 + 32 * 48
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == METHODS
    Image.open(tmp_path / "plots" / "comparison.png").verify()
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "adapt", None)  # nothing is run again
        assert stages.run(tiny(*TYPED), tmp_path) == metrics
    ran = []
    original = compare.adapt
    monkeypatch.setattr(compare, "adapt", lambda *arguments: ran.append(original(*arguments)))
    stages.run(tiny(*TYPED, "optimizer.lr=1e-3", "stage.seeds=[1]", "stage.methods=[RECAST]"), tmp_path)
    assert len(ran) == 1  # another configuration is


def test_every_adapter_that_fits_has_its_rows_with_its_preset(tiny: Compose) -> None:
    rows = compare.methods(tiny("stage=compare", "model=vit_att"))
    fitting = [name for name in adapters.names() if name not in ("none", "clr")]
    assert list(rows) == [
        *("linear probe", "RECAST"),
        *(row for name in fitting for row in (name, f"RECAST + {name}")),
        "full fine-tuning",
    ]
    assert rows["RECAST + piggyback"].optimizer.adapter_lr == 1e-4
    assert rows["melo"].adapter == {"name": "melo", "rank": 4, "alpha": 4.0}
    assert rows["melo"].model.method == "frozen"
    assert "clr" in compare.methods(tiny("stage=compare", "model=resnet"))
    assert "RECAST" not in compare.methods(tiny("stage=compare", "model=vit_frozen"))


def test_a_method_that_there_is_not(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        stages.run(tiny("stage=compare", "model=vit_att", "stage.methods=[lora]"), tmp_path)
    assert_one_line(error, "stage.methods: got 'lora'", "RECAST + melo")
