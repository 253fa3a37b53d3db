"""Which file wins: a method over its dataset, this machine over all files, the command line over everything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from recast_exp.cli.check import CommandLine, check
from recast_exp.config.schema import Config
from recast_exp.runs.plan import recipe_line


def settings_of(*typed: str, **flags: object) -> Config:
    found = check(CommandLine(typed, inputs=False, **flags))  # type: ignore[arg-type]
    assert (found.wrong, found.missing) == ([], [])
    return found.jobs[0].settings


def test_a_method_is_a_method_on_every_dataset() -> None:
    """D14: the learning rates of the digits replaced those of a method."""
    on_digits = settings_of("method=recast_resnet_piggyback", "dataset=digits")
    on_birds = settings_of("method=recast_resnet_piggyback", "dataset=cub")
    optimizer = on_digits.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.coefficients_lr, optimizer.adapter_lr) == ("adam", 3e-2, 5e-4, 1e-4)
    assert on_digits.dataset.batch_size == on_birds.dataset.batch_size == 64
    assert on_digits.scheduler.adapter_step_size == 30
    assert (on_digits.optimizer.lr, on_digits.optimizer.weight_decay) == (
        on_birds.optimizer.lr,
        on_birds.optimizer.weight_decay,
    )


def test_a_dataset_sets_what_no_method_names() -> None:
    settings = settings_of("method=recast_att", "dataset=digits")
    assert (settings.optimizer.lr, settings.trainer.max_epochs, settings.scheduler.name) == (5e-2, 30, "cosine")
    assert settings_of("method=recast_att", "dataset=digits", "optimizer.lr=1e-3").optimizer.lr == 1e-3
    assert settings_of("experiment=authors_resnet", "dataset=digits").dataset.batch_size == 64


def test_a_run_says_which_file_set_its_recipe() -> None:
    found = check(CommandLine(("method=recast_resnet_piggyback", "trainer.max_epochs=7"), inputs=False))
    [job] = found.jobs
    line = recipe_line(job.settings, job.sources)
    assert line.startswith("Recipe: adam, cosine schedule, 7 epochs; ")
    method = next(part for part in line.split("; ") if part.startswith("method=recast_resnet_piggyback sets"))
    assert "optimizer.lr=0.03" in method and "dataset.batch_size=64" in method
    dataset = next(part for part in line.split("; ") if part.startswith("dataset=digits sets"))
    assert "optimizer.lr" not in dataset
    assert line.endswith("command line sets trainer.max_epochs=7")


LOCAL = """# @package _global_
defaults:
  - override /logger: tensorboard
data_dir: /somewhere/data
cache_dir: /somewhere/cache
model:
  weights: some.safetensors
"""


def test_a_machine_has_a_place_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text(LOCAL)
    folder = {"config_dir": str(tmp_path)}
    settings = settings_of("dataset=cub", **folder)
    assert (settings.data_dir, settings.cache_dir) == ("/somewhere/data", "/somewhere/cache")
    assert (settings.logger.name, settings.model.weights) == ("tensorboard", "some.safetensors")
    typed = settings_of("dataset=cub", "data_dir=here", "logger=csv", "model.weights=null", **folder)
    assert (typed.data_dir, typed.logger.name, typed.model.weights) == ("here", "csv", None)
    assert settings_of("dataset=cub").data_dir == "data"


def test_a_local_launcher(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("# @package _global_\ndefaults:\n  - override /launcher: joblib\n")
    found = check(CommandLine(("seed=1,2",), multirun=True, inputs=False, config_dir=str(tmp_path)))
    assert found.wrong == []
    assert found.composer is not None
    assert found.composer.whole().hydra.runtime.choices["hydra/launcher"] == "joblib"
    single = check(CommandLine((), inputs=True, config_dir=str(tmp_path)))  # a single run starts without it
    assert single.wrong == []


def test_what_a_role_decides(compose: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    from recast_exp.config import keys
    from recast_exp.config.fields import Role

    caplog.set_level(logging.INFO)
    assert all(keys.role_of(key) in Role for key in keys.FIELDS)
    assert keys.role_of("adapter.rank") is Role.MODEL
    before = {"seed": 1, "optimizer.lr": 0.1, "data_dir": "a", "logger.name": "csv", "stage": {"name": "adapt"}}
    now = {"seed": 1, "optimizer.lr": 0.2, "data_dir": "b", "logger.name": "wandb", "mimicry.options": {}, "gone": 3}
    assert keys.differences(before, now) == {"optimizer.lr": (0.1, 0.2)}
    assert keys.differences({"seed": 1}, {"seed": 1, "mimicry.options": {"a": 1}}) == {
        "mimicry.options": ({}, {"a": 1})
    }


def test_a_local_file_without_its_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "local.yaml").write_text("data_dir: /somewhere\n")
    found = check(CommandLine((), inputs=False, config_dir=str(tmp_path)))
    assert len(found.wrong) == 1
    assert found.wrong[0].startswith('local.yaml: expected "# @package _global_" as its first line')
