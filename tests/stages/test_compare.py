"""`stage=compare` on a few methods, a few steps each."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import TINY
from recast_exp import MeLo, adapters
from recast_exp.cli.job import job_label
from recast_exp.config import recipes
from recast_exp.config.compose import Composer
from recast_exp.config.schema import Config
from recast_exp.config.variants import Variants
from recast_exp.display import console
from recast_exp.errors import UserError
from recast_exp.experiment import comparison
from support.fixtures_data import make_folder, write_image
from support.helpers import assert_one_line
from support.running import run_stage

Compose = Callable[..., Config]
METHODS = ["RECAST-Att", "RECAST-Att + Piggyback"]
Compared = Callable[..., dict[str, Any]]
TYPED = ("stage=compare", "model=vit_att", "stage.seeds=[1,2]", f"stage.methods={json.dumps(METHODS)}")


@pytest.fixture
def compared(tiny: Compose, tmp_path: Path, weights: dict[str, Path]) -> Compared:
    """Runs `stage=compare` in the test's folder; its metrics."""

    def compared(*overrides: str) -> dict[str, Any]:
        typed = [*TINY, f"model.weights={weights['digits_vit']}", *overrides]
        return run_stage(tiny(*overrides), tmp_path, typed=typed)

    return compared


def methods(tiny: Compose, *overrides: str, config_dir: Path | None = None) -> dict[str, Config]:
    composer = Composer(config_dir=str(config_dir) if config_dir else None)
    typed = ["stage=compare", *overrides]
    return comparison.methods(tiny(*typed), Variants(composer, typed))


def test_methods_beside_each_other(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = compared(*TYPED)
    summary = json.loads((tmp_path / "comparison.json").read_text())
    assert list(summary) == METHODS
    for name, row in summary.items():
        runs = [tmp_path / "runs" / name.replace(" ", "_") / str(seed) for seed in (1, 2)]
        accuracies = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in runs]
        assert row["test/accuracy"] == metrics[f"{name}/test/accuracy"] == pytest.approx(statistics.fmean(accuracies))
        assert row["test/accuracy/spread"] == pytest.approx(statistics.stdev(accuracies))
        assert row["runs"] == 2
    assert summary["RECAST-Att"]["task_specific"] == 48
    piggyback = summary["RECAST-Att + Piggyback"]
    assert piggyback["task_bits"] == piggyback["task_specific"] - 48 + 32 * 48
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == METHODS
    Image.open(tmp_path / "plots" / "comparison.png").verify()
    out = capsys.readouterr().out
    assert all(name in out for name in METHODS)

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "adapt", None)  # nothing is run again
        assert compared(*TYPED) == metrics
    ran = []
    original = comparison.adapt
    monkeypatch.setattr(comparison, "adapt", lambda *arguments: ran.append(original(*arguments)))
    compared(*TYPED, "optimizer.lr=1e-3", "stage.seeds=[1]", "stage.methods=[RECAST-Att]")
    assert len(ran) == 1  # another configuration is


def test_a_table_holds_results_on_one_set_of_images(compared: Compared, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", count=10)
    of_images = ("model.backbone=digits_vit", "dataset=folder", f"dataset.path={root}")
    typed = ("stage=compare", "model=vit_att", *of_images, 'stage.methods=["linear probe"]')
    compared(*typed, "stage.draws=[0]")
    compared(*typed, "stage.draws=[0]")
    write_image(root / "class2" / "new.png", seed=9, size=(12, 10))
    with pytest.raises(UserError) as error:
        compared(*typed, "stage.draws=[0,1]")
    assert_one_line(error, "dataset: expected the images that the run in", "got other files or labels in")


def test_the_table_fits_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task_specific": 1_348_704, "task_bits": 32 * 1_348_704, "runs": 3, "seconds": 53.2}
    row |= {f"{part}/accuracy{spread}": 0.9876 for part in ("val", "test") for spread in ("", "/spread")}
    console.show_comparison("vit_att on digits", {"RECAST-Att + AdaptFormer": row})
    out = capsys.readouterr().out
    assert "53 s" in out and "5,394,816" in out and "…" not in out


def test_every_adapter_that_fits_has_its_rows_with_its_preset(tiny: Compose) -> None:
    rows = methods(tiny, "model=vit_att")
    options = [name for name in Composer().groups()["adapter"] if name in adapters.names() and name != "clr"]
    fitting = [adapters.from_config(tiny(f"adapter={name}", "model=vit_att").adapter).label for name in options]
    fitting = [label for label in fitting if label]
    assert list(rows) == [
        *("linear probe", "RECAST-Att", "RECAST-Att+MLP", "RECAST-MLP"),
        *(row for label in fitting for row in (label, f"RECAST-Att + {label}")),
        "full fine-tuning",
    ]
    assert rows["RECAST-Att + Piggyback"].optimizer.adapter_lr == 1e-4
    assert rows["MeLo"].adapter == {"name": "melo", **dataclasses.asdict(MeLo())}
    assert rows["MeLo"].model.method == "frozen"
    assert rows["RECAST-MLP"].recast.targets == ["*.mlp.fc1", "*.mlp.fc2"]
    on_resnet = methods(tiny, "model=resnet")
    assert "CLR" in on_resnet
    assert [name for name in on_resnet if name.startswith("RECAST-") and "+" not in name] == ["RECAST-ResNet"]
    assert not any(name.startswith("RECAST") for name in methods(tiny, "model=vit_frozen"))


def test_a_preset_is_taken_whole_and_a_folder_of_the_users_own_has_more(tiny: Compose, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "vit_heads.yaml").write_text(
        "# @package _global_\ndefaults: [vit_att]\nmodel: {name: vit_heads, label: RECAST-Heads}\n"
        "recast: {granularity: head}\noptimizer: {weight_decay: 0.007}\n"
    )
    rows = methods(tiny, "model=vit_att", "optimizer.momentum=0.5", config_dir=tmp_path)
    own = rows["RECAST-Heads"]
    assert (own.recast.granularity, own.optimizer.weight_decay, own.optimizer.momentum) == ("head", 0.007, 0.5)
    assert rows["RECAST-Att"].recast.granularity == "layer"
    # A key of the recipe that was typed wins over a preset's; a key that makes the method what it is does not
    rows = methods(tiny, "model=vit_att", "optimizer.weight_decay=0.5", "recast.num_groups=3", config_dir=tmp_path)
    assert rows["RECAST-Heads"].optimizer.weight_decay == 0.5
    assert rows["RECAST-Att"].recast.num_groups == 3


def test_an_adapter_that_was_typed_keeps_its_options(tiny: Compose) -> None:
    rows = methods(tiny, "model=vit_att", "adapter=melo", "adapter.rank=8")
    assert rows["MeLo"].adapter["rank"] == rows["RECAST-Att + MeLo"].adapter["rank"] == 8
    assert rows["AdaptFormer"].adapter["name"] == "adaptformer"


def test_its_job_goes_by_no_single_method(tiny: Compose) -> None:
    assert job_label(tiny("stage=compare", "model=vit_att")) == "comparison"
    assert job_label(tiny("model=vit_att")) == "RECAST-Att"


def test_draws_of_the_images_in_place_of_seeds(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared("stage=compare", "model=vit_att", "stage.methods=[linear probe]", "stage.draws=[0,3]")
    runs = [tmp_path / "runs" / "linear_probe" / f"draw {draw}" for draw in (0, 3)]
    configs = [json.loads((run / "job.json").read_text())["config"] for run in runs]
    assert [config["dataset"]["split_seed"] for config in configs] == [0, 3]
    assert configs[0]["seed"] == configs[1]["seed"]
    accuracies = [json.loads((run / "metrics.json").read_text())["test/accuracy"] for run in runs]
    row = json.loads((tmp_path / "comparison.json").read_text())["linear probe"]
    assert row["runs"] == 2
    assert row["test/accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert "2 draw(s)" in capsys.readouterr().out


def test_methods_of_the_users_own_on_the_same_backbone(tiny: Compose) -> None:
    composer = Composer()
    typed = ["stage=compare", "model=vit_att", "optimizer.lr=0.5", "recast.num_groups=3"]
    more = {
        "rows": "model=vit_mlp recast.granularity=row optimizer.lr=0.25",
        "gains": "recast.num_groups=12 recast.num_templates=null",
        "VeRA": "model=vit_frozen adapter=peft adapter.method=VERA",
    }
    rows = comparison.methods(tiny(*typed), Variants(composer, typed), more)
    assert list(rows)[-3:] == list(more)
    assert {name: (row.label, row.stage["name"]) for name, row in rows.items() if name in more} == {
        name: (name, "adapt") for name in more
    }
    own = rows["rows"]
    assert (own.recast.granularity, own.recast.num_groups, own.optimizer.lr) == ("row", 6, 0.25)
    assert own.recast.targets == ["*.mlp.fc1", "*.mlp.fc2"]
    assert (rows["gains"].recast.num_groups, rows["gains"].optimizer.lr) == (12, 0.5)
    assert (rows["VeRA"].model.method, rows["VeRA"].adapter["method"]) == ("frozen", "VERA")
    assert len({row.model.backbone for row in rows.values()}) == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"MeLo": "adapter=melo"}, "stage.more: expected labels of their own, got 'MeLo'"),
        ({"x": "model=vit_mpl"}, "stage.more: x: model: expected one of"),
        ({"x": "recast.granularty=row"}, "stage.more: x: recast.granularty=row: expected an option of a group, or"),
        ({"x": "model=vit_mlp seed=3"}, "stage.more: x: expected what sets this method apart, got seed=3, which all"),
        (
            {"x": "dataset.split_seed=1"},
            "stage.more: x: expected what sets this method apart, got dataset.split_seed=1",
        ),
        ({"x": "dataset=cub"}, "stage.more: x: expected what sets this method apart, got dataset=cub, which all"),
        ({"x": "recast.num_groups=40"}, "stage.more: x: recast.num_groups: expected at most 12"),
        ({"x": "model=vit_frozen adapter=peft adapter.method=VARE"}, "stage.more: x: adapter.method: expected one of"),
    ],
)
def test_what_cannot_be_added_is_refused_before_anything_runs(
    more: dict[str, str], expected: str, tiny: Compose
) -> None:
    typed = ["stage=compare", "model=vit_att"]
    with pytest.raises(UserError) as error:
        comparison.methods(tiny(*typed), Variants(Composer(), typed), more)
    assert_one_line(error, expected)


def test_a_method_that_there_is_not(compared: Compared) -> None:
    with pytest.raises(UserError) as error:
        compared("stage=compare", "model=vit_att", "stage.methods=[lora]")
    assert_one_line(error, "stage.methods: expected", "RECAST-Att + MeLo", "got 'lora'")


def test_validation_chooses_the_recipe_and_the_test_images_wait(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = (
        *("stage=compare", "model=vit_att", "stage.seeds=[1,2]", "stage.methods=[linear probe,RECAST-Att]"),
        'stage.tune=["optimizer.lr=1e-9,1e-2","optimizer.lr_scale=1","trainer.head_first_epochs=0,1"]',
        "stage.tune_by=loss",
    )
    tested = []
    original = comparison.adapt
    monkeypatch.setattr(
        comparison, "adapt", lambda settings, *rest: tested.append(settings) or original(settings, *rest)
    )
    compared(*tuned)
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
    assert {settings.optimizer.lr for settings in tested[2:]} == {
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
    monkeypatch.setattr(comparison, "adapt", None)
    monkeypatch.setattr(comparison, "validate", None)
    compared(*tuned)  # all is there


def test_recipes_are_compared_by_their_mean_over_the_seeds(
    compared: Compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first seed alone would choose the other recipe."""
    losses = {(1, 1e-3): 0.1, (2, 1e-3): 0.9, (1, 1e-2): 0.2, (2, 1e-2): 0.2}

    def validate(settings: Config, run_dir: Path) -> dict[str, float]:
        return {"val/accuracy": 0.5, "val/loss": losses[settings.seed, settings.optimizer.lr]}

    monkeypatch.setattr(comparison, "validate", validate)
    typed = ("stage=compare", "stage.seeds=[1,2,3]", "stage.tune_seeds=2", "stage.methods=[linear probe]")
    compared(*typed, 'stage.tune=["optimizer.lr=1e-3,1e-2"]')
    trials = list(csv.DictReader((tmp_path / "recipes.csv").read_text().splitlines()))
    assert [(float(row["val/loss"]), row["chosen"]) for row in trials] == [(0.5, "False"), (0.2, "True")]
    tested = sorted(path.parent.name for path in tmp_path.glob("runs/linear_probe/*/metrics.json"))
    assert tested == ["1 lr=0.01", "2 lr=0.01", "3 lr=0.01"]
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*.ckpt"))


def test_a_probe_that_has_nothing_to_try_is_trained_as_configured(compared: Compared, tmp_path: Path) -> None:
    typed = ("stage=compare", "stage.seeds=[1]", "stage.methods=[linear probe]", "stage.tune=[optimizer.lr_scale=1]")
    assert "linear probe/test/accuracy" in compared(*typed)
    assert not (tmp_path / "recipes.csv").exists()
    assert [path.parent.name for path in tmp_path.glob("runs/linear_probe/*/metrics.json")] == ["1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr_scale=0.3,-1", "stage.tune: optimizer.lr_scale: expected a number > 0, got -1"),
        ("optimizer.lr_scal=1", "did you mean optimizer.lr_scale?"),
        ("model.name=a,b", "keys of optimizer, scheduler, trainer"),
        ("3", "expected key=value,value"),
        ("optimizer.lr=interval(0,1)", "values separated by commas"),
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
