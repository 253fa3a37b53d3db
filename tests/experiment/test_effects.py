"""Keys that were typed though nothing depends on them: each is told apart by what it does to the predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from recast_exp import stages
from recast_exp.cli import main as cli
from recast_exp.config.schema import Config
from recast_exp.experiment.effects import no_effect
from support.running import run_stage

Compose = Callable[..., Config]


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("optimizer.lr=1e-5 training=through_head", "what trains has optimizer.coefficients_lr instead"),
        ("optimizer.lr=1e-5 training=joint", None),
        ("optimizer.lr=1e-5 training=through_head optimizer.coefficients_lr=null", None),
        ("optimizer.coefficients_lr=0.01", None),
        ("optimizer.adapter_lr=0.01", "there is no adapter to train"),
        ("optimizer.adapter_lr=0.01 adapter=melo", None),
        ("optimizer.momentum=0.1", "optimizer=adamw has none"),
        ("scheduler.step_size=1", "scheduler=cosine has no steps"),
        ("scheduler.step_size=1 scheduler=step", None),
        ("scheduler.adapter_step_size=1 scheduler=step", "there is no adapter to train"),
        ("dataset.views=2 dataset.transform=none", "dataset.transform=none alters no image"),
        ("training.shots=2 training=through_head", "training.queries is not set"),
        (
            "training.splits=2 training=through_head training.measured=leave_one_out",
            "training.measured=splits is not set",
        ),
        ("training.splits=2 training=through_head", None),
        ("dataset.batch_size=7 training=through_head", "a step of training=through_head has training.images"),
        ("dataset.batch_size=7", None),
        ("recast.num_groups=1 model=vit_frozen", "model=vit_frozen has no templates"),
        ("mimicry.steps=3", "mimicry=closed_form has no such option"),
        ("mimicry.steps=3 mimicry=gradient", None),
        ("adapter.sparsity=3.0 adapter=melo", "adapter.rank_gates is not set"),
        ("adapter.sparsity=3.0 adapter=melo adapter.rank_gates=true", None),
        ("optimizer.coefficients_pull=0.1 model=vit_frozen", "there are no coefficients to train"),
        ("optimizer.lr_scale=2.0 model=vit_frozen", "only the head trains"),
        ("optimizer.lr_scale=2.0", None),
        ("optimizer.head_weight_decay=0.1", None),
        ("optimizer.head_weight_decay=0.1 training=through_head", "training=through_head solves the head"),
        ("optimizer.weight_decay=0.1", None),
        (
            "optimizer.weight_decay=0.1 training=through_head",
            "what trains has optimizer.coefficients_weight_decay instead",
        ),
    ],
)
def test_a_key_without_effect_leaves_the_predictions(
    typed: str, reason: str | None, tiny: Compose, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key, _, _ = typed.partition("=")
    first, *others = typed.split()
    assert no_effect(key, tiny("model=vit_att", first, *others)) == reason
    if reason is None:
        return
    without = tmp_path_factory.getbasetemp() / f"without {' '.join(others)}"  # several cases share it
    folders = [tmp_path_factory.mktemp("with"), without]
    run_stage(tiny("model=vit_att", first, *others), folders[0])
    if not without.exists():
        run_stage(tiny("model=vit_att", *others), without)
    predictions = [(folder / "predictions.csv").read_bytes() for folder in folders]
    assert predictions[0] == predictions[1]


def test_a_run_says_which_keys_have_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recast_exp"])
    typed = ("model.pretrained=false", "logger=none", "probe=false", "trainer.max_epochs=1", "trainer.limit_batches=1")
    with caplog.at_level(logging.WARNING, "recast_exp"):
        assert cli.run([*typed, "optimizer.lr=1e-5", "hydra.run.dir=run"]) == 0
    text = (tmp_path / "run" / "recast_exp.log").read_text()
    assert "optimizer.lr: no effect: what trains has optimizer.coefficients_lr instead" in text
    assert "trainer.max_epochs: no effect" not in text


def test_a_stage_says_which_of_its_options_have_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["recast_exp"])
    typed = ("stage=reconstruct", "stage.sizes=[1]", "model.pretrained=false", "hydra.run.dir=run")
    with caplog.at_level(logging.WARNING, "recast_exp"):
        assert cli.run([*typed]) == 0
    assert "stage.sizes: no effect: stage.sweep is not set" in (tmp_path / "run" / "recast_exp.log").read_text()


@pytest.mark.parametrize(
    ("stage", "key", "reason"),
    [
        ("evaluate", "optimizer.lr", "nothing is trained"),
        ("evaluate", "head", "nothing is trained"),
        ("evaluate", "dataset.shots", None),
        ("compare", "seed", "stage.seeds has those that it runs"),
        ("compare", "stage.tune_seeds", "stage.tune is not set"),
        ("compare", "optimizer.lr", None),
    ],
)
def test_keys_that_a_stage_does_not_use(stage: str, key: str, reason: str | None) -> None:
    assert stages.from_config({"name": stage}).no_effect(key) == reason
