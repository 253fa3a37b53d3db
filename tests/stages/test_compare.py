"""`stage=compare` on a few methods, a few steps each."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from recast_exp import adapters
from recast_exp.config import compose as composition
from recast_exp.display import console
from recast_exp.errors import UserError
from recast_exp.search import recipes
from recast_exp.stages import compare
from support.helpers import assert_one_line
from support.running import run_stage

Compose = Callable[..., DictConfig]
METHODS = ["RECAST-Att", "RECAST-Att + Piggyback"]
TYPED = ("stage=compare", "model=vit_att", "stage.seeds=[1,2]", f"stage.methods={json.dumps(METHODS)}")


def test_methods_beside_each_other(
    tiny_cfg: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run_stage(tiny_cfg(*TYPED), tmp_path)
    summary = json.loads((tmp_path / "comparison.json").read_text())
    assert list(summary) == METHODS
    for name, row in summary.items():
        runs = [tmp_path / "runs" / name.replace(" ", "_") / str(seed) for seed in (1, 2)]
        accuracies = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in runs]
        assert row["test/accuracy"] == metrics[f"{name}/test/accuracy"] == pytest.approx(statistics.fmean(accuracies))
        assert row["test/accuracy/spread"] == pytest.approx(statistics.stdev(accuracies))
        assert row["seeds"] == 2
    assert summary["RECAST-Att"]["task_specific"] == 48
    piggyback = summary["RECAST-Att + Piggyback"]
    assert piggyback["task_bits"] == piggyback["task_specific"] - 48 + 32 * 48
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == METHODS
    Image.open(tmp_path / "plots" / "comparison.png").verify()
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)

    with monkeypatch.context() as patch:
        patch.setattr(compare, "adapt", None)  # nothing is run again
        assert run_stage(tiny_cfg(*TYPED), tmp_path) == metrics
    ran = []
    original = compare.adapt
    monkeypatch.setattr(compare, "adapt", lambda *arguments: ran.append(original(*arguments)))
    run_stage(tiny_cfg(*TYPED, "optimizer.lr=1e-3", "stage.seeds=[1]", "stage.methods=[RECAST-Att]"), tmp_path)
    assert len(ran) == 1  # another configuration is


def test_the_table_fits_a_terminal_of_80_columns(tiny_cfg: Compose, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task_specific": 1_348_704, "task_bits": 32 * 1_348_704, "seeds": 3, "seconds": 53.2}
    row |= {f"{part}/accuracy{spread}": 0.9876 for part in ("val", "test") for spread in ("", "/spread")}
    console.show_comparison(tiny_cfg("stage=compare"), {"RECAST-Att + AdaptFormer": row})
    out = capsys.readouterr().out
    assert "53 s" in out and "5,394,816" in out and "…" not in out


def test_every_adapter_that_fits_has_its_rows_with_its_preset(tiny_cfg: Compose) -> None:
    rows = compare.methods(tiny_cfg("stage=compare", "model=vit_att"))
    presets = (OmegaConf.load(composition.conf_dir() / "adapter" / f"{name}.yaml") for name in adapters.names())
    fitting = [adapters.from_config(each.get("adapter", each)).label for each in presets]
    fitting = [label for label in fitting if label not in ("", "CLR")]
    assert list(rows) == [
        *("linear probe", "RECAST-Att", "RECAST-Att+MLP", "RECAST-MLP"),
        *(row for label in fitting for row in (label, f"RECAST-Att + {label}")),
        "full fine-tuning",
    ]
    assert rows["RECAST-Att + Piggyback"].optimizer.adapter_lr == 1e-4
    assert rows["MeLo"].adapter == {"name": "melo", "rank": 4, "alpha": 4.0}
    assert rows["MeLo"].model.method == "frozen"
    assert rows["RECAST-MLP"].recast.targets == ["*.mlp.fc1", "*.mlp.fc2"]
    on_resnet = compare.methods(tiny_cfg("stage=compare", "model=resnet"))
    assert "CLR" in on_resnet
    assert [name for name in on_resnet if name.startswith("RECAST-") and "+" not in name] == ["RECAST-ResNet"]
    assert not any(name.startswith("RECAST") for name in compare.methods(tiny_cfg("stage=compare", "model=vit_frozen")))


def test_a_method_that_there_is_not(tiny_cfg: Compose, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_stage(tiny_cfg("stage=compare", "model=vit_att", "stage.methods=[lora]"), tmp_path)
    assert_one_line(error, "stage.methods: got 'lora'", "RECAST-Att + MeLo")


def test_validation_chooses_the_recipe_and_the_test_images_wait(
    tiny_cfg: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = (
        *("stage=compare", "model=vit_att", "stage.seeds=[1,2]", "stage.methods=[linear probe,RECAST-Att]"),
        'stage.tune=["optimizer.lr=1e-9,1e-2","optimizer.lr_scale=1","trainer.head_first_epochs=0,1"]',
        "stage.tune_by=loss",
    )
    tested = []
    original = compare.adapt
    monkeypatch.setattr(compare, "adapt", lambda cfg, *rest: tested.append(cfg) or original(cfg, *rest))
    run_stage(tiny_cfg(*tuned), tmp_path)
    trials = list(csv.DictReader((tmp_path / "recipes.csv").read_text().splitlines()))
    # Where there is only a head, its rate is all there is to try; a second key is tried with the best of the first
    assert [(row["method"], row["recipe"]) for row in trials[:2]] == [
        ("linear probe", "lr=1e-09"),
        ("linear probe", "lr=0.01"),
    ]
    recast = trials[2:]
    assert [row["recipe"].split()[2] for row in recast] == ["head_first_epochs=0"] * 2 + ["head_first_epochs=1"]
    for rows in (trials[:2], recast):
        best = min(rows, key=lambda row: float(row["val/loss"]))
        assert [row["chosen"] for row in rows] == [str(row is best) for row in rows]
    assert len(tested) == 4  # two methods, two seeds
    assert {cfg.optimizer.lr for cfg in tested[2:]} == {
        float(row["recipe"].split()[0].split("=")[1]) for row in recast if row["chosen"] == "True"
    }
    folders = sorted(path.name for path in (tmp_path / "runs" / "RECAST-Att").iterdir())
    assert len(folders) == 4
    assert sum((tmp_path / "runs" / "RECAST-Att" / name / "metrics.json").is_file() for name in folders) == 2
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*.ckpt"))

    # The winner's training was not repeated for its test
    seed1 = next(path.parent for path in tmp_path.glob("runs/RECAST-Att/1 */metrics.json"))
    validated = json.loads((seed1 / "validation.json").read_text())
    measured = json.loads((seed1 / "metrics.json").read_text())
    assert measured["seconds"] == validated["seconds"]
    assert measured["val/loss"] == validated["val/loss"]
    monkeypatch.setattr(compare, "adapt", None)
    monkeypatch.setattr(compare, "validate", None)
    run_stage(tiny_cfg(*tuned), tmp_path)  # all is there


def test_recipes_are_compared_by_their_mean_over_the_seeds(
    tiny_cfg: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seed alone would choose the other recipe."""
    losses = {(1, 1e-3): 0.1, (2, 1e-3): 0.9, (1, 1e-2): 0.2, (2, 1e-2): 0.2}

    def validate(cfg: DictConfig, run_dir: Path) -> dict[str, float]:
        return {"val/accuracy": 0.5, "val/loss": losses[cfg.seed, cfg.optimizer.lr]}

    monkeypatch.setattr(compare, "validate", validate)
    typed = ("stage=compare", "stage.seeds=[1,2,3]", "stage.tune_seeds=2", "stage.methods=[linear probe]")
    run_stage(tiny_cfg(*typed, 'stage.tune=["optimizer.lr=1e-3,1e-2"]'), tmp_path)
    trials = list(csv.DictReader((tmp_path / "recipes.csv").read_text().splitlines()))
    assert [(float(row["val/loss"]), row["chosen"]) for row in trials] == [(0.5, "False"), (0.2, "True")]
    tested = sorted(path.parent.name for path in tmp_path.glob("runs/linear_probe/*/metrics.json"))
    assert tested == ["1 lr=0.01", "2 lr=0.01", "3 lr=0.01"]
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*.ckpt"))


def test_a_probe_that_has_nothing_to_try_is_trained_as_configured(tiny_cfg: Compose, tmp_path: Path) -> None:
    typed = ("stage=compare", "stage.seeds=[1]", "stage.methods=[linear probe]", "stage.tune=[optimizer.lr_scale=1]")
    assert "linear probe/test/accuracy" in run_stage(tiny_cfg(*typed), tmp_path)
    assert not (tmp_path / "recipes.csv").exists()
    assert [path.parent.name for path in tmp_path.glob("runs/linear_probe/*/metrics.json")] == ["1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr_scale=0.3,-1", "stage.tune: optimizer.lr_scale: expected a number > 0, got -1"),
        ("optimizer.lr_scal=1", "did you mean optimizer.lr_scale?"),
        ("model.name=a,b", "takes keys of optimizer, scheduler, trainer"),
        ("3", "takes key=value,value"),
        ("optimizer.lr=interval(0,1)", "takes values with commas"),
    ],
)
def test_recipes_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        recipes.parse([text])
    assert_one_line(error, expected)


def test_nothing_to_try_is_no_search() -> None:
    found = recipes.search({}, {}, lambda recipe: (0.0, 0.0))  # a linear probe has no epochs of its head alone to try
    assert (found.trials, found.recipe) == ([], {})


def test_recipes_are_tried_key_by_key() -> None:
    loss = {(1, 0): 3.0, (2, 0): 1.0, (3, 0): 2.0, (2, 5): 1.5}
    asked = []

    def validate(recipe: dict[str, int]) -> tuple[float, float]:
        asked.append((recipe["a"], recipe["b"]))
        return 0.5, loss[asked[-1]]

    found = recipes.search({"a": 1, "b": 0}, {"a": [1, 2, 3], "b": [0, 5]}, validate)
    assert asked == [(1, 0), (2, 0), (3, 0), (2, 5)]
    assert found.best.recipe == {"a": 2, "b": 0}


@pytest.mark.parametrize(("by", "best"), [("accuracy", 2), ("loss", 3)])
def test_recipes_are_compared_by_accuracy_or_by_loss(by: str, best: int) -> None:
    measured = {1: (0.8, 0.5), 2: (0.9, 0.9), 3: (0.8, 0.4), 4: (0.7, 0.4), 5: (0.9, 1.0)}  # the other decides equals
    found = recipes.search({}, {"a": [1, 2, 3, 4, 5]}, lambda recipe: measured[recipe["a"]], by)
    assert found.recipe == {"a": best}
