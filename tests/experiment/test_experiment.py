"""An experiment's parts, and that building and training them leaves the caller's process as it was."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from recast_exp.config.schema import Config
from recast_exp.data.store import PixelStore
from recast_exp.errors import MissingInputError, UserError
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.probe import probe
from recast_exp.models.backbones import create_backbone
from recast_exp.models.bank_cache import Material, _settings
from recast_exp.models.loading import apply_task, load_task
from recast_exp.training.loop import fit
from recast_exp.training.loop import test as measure
from support.fixtures_data import make_cub
from support.running import run_stage

Compose = Callable[..., Config]
SET_ON_IMPORT = {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}  # by scikit-learn and joblib


@pytest.fixture
def birds(tiny: Compose, tmp_path: Path) -> Experiment:
    make_cub(tmp_path, numbers=(1, 4, 12), train=4, test=5)
    typed = ("dataset=cub", "dataset.verify=false", "model=vit_att", "model.backbone=digits_vit", "recast.num_groups=6")
    return Experiment.open(tiny(*typed, f"data_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"))


def kept(experiment: Experiment) -> list[Path]:
    return list(experiment.cache.glob("images/*/pixels.bin"))


def test_images_are_kept_where_they_are_asked_for_after_they_were_not(birds: Experiment) -> None:
    birds.data()
    assert kept(birds) == []
    data = birds.data(keep=True)
    assert len(kept(birds)) > 0
    assert {type(dataset.store) for dataset in data.datasets.values()} == {PixelStore}
    again = birds.data()  # what is kept is used
    assert {type(dataset.store) for dataset in again.datasets.values()} == {PixelStore}


def state() -> dict[str, Any]:
    """What of the process a library must not change."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "filters": list(warnings.filters),
        "environment": {name: value for name, value in os.environ.items() if name not in SET_ON_IMPORT},
        "rank": rank_zero_only.rank,  # type: ignore[attr-defined]
        "default dtype": torch.get_default_dtype(),
    }


def changed(before: dict[str, Any]) -> list[str]:
    now = state()
    return [name for name in before if now[name] != before[name]]


@pytest.mark.parametrize("typed", [("model=vit_att", "adapter=melo"), ("model=vit_full",), ("model=resnet",)])
def test_building_and_training_leave_the_process_as_it_was(typed: tuple[str, ...], tiny: Compose) -> None:
    small = ("trainer.max_epochs=1", "trainer.limit_batches=1", "dataset.max_per_class=4")
    settings = tiny(*typed, *small, "trainer.num_threads=2", "seed=5")
    torch.manual_seed(11)
    before = state()
    create_backbone(settings.model)
    experiment = Experiment.open(settings)
    assert changed(before) == []
    banks, _ = experiment.banks()
    assert changed(before) == []
    probe(experiment)
    assert changed(before) == []
    adapted = experiment.adapt(banks)
    assert changed(before) == []
    data = experiment.data(keep=True)
    fit(experiment.recipe, adapted, data)
    assert changed(before) == []
    measure(experiment.recipe, adapted, data)
    assert changed(before) == []


def test_an_embedded_backbone_needs_its_weights(compose: Compose) -> None:
    with pytest.raises(MissingInputError, match=r"model\.backbone: expected a file with the weights .* digits_vit"):
        create_backbone(compose("model=vit_att").model)


def test_the_same_weights_with_other_arguments_are_another_backbone(tiny: Compose, tmp_path: Path) -> None:
    """With two heads of attention instead of three, the same weights compute other features."""

    def result(heads: int, cache: str) -> dict[str, float]:
        typed = ("model=vit_frozen", f"model.arguments={{num_heads: {heads}}}", f"cache_dir={tmp_path / cache}")
        metrics = run_stage(tiny(*typed), tmp_path / f"run-{cache}-{heads}")
        return {name: metrics[name] for name in ("val/accuracy", "test/accuracy", "test/loss")}

    three, two = result(3, "shared"), result(2, "shared")
    assert three == result(3, "three")
    assert two == result(2, "two") != three


def test_a_calibrated_bank_is_one_of_what_the_network_computes(tiny: Compose) -> None:
    materials = (Material((), None), Material((), torch.zeros(1, 3, 8, 8)))

    def keys(*typed: str) -> list[object]:
        settings = tiny("model=vit_att", "mimicry=calibrated", *typed)
        backbone = Experiment.open(tiny("model=vit_frozen", *typed)).backbone
        return [_settings(backbone, settings.recast, settings.mimicry, each) for each in materials]

    (weights_alone, with_images), (other_alone, other_with_images) = keys(), keys("model.arguments={num_heads: 2}")
    assert weights_alone == other_alone  # a bank of the weights alone serves both
    assert with_images != other_with_images


def test_a_task_is_applied_to_the_arguments_that_it_was_trained_with(tiny: Compose, tmp_path: Path) -> None:
    run_stage(tiny("model=vit_att", "model.arguments={num_heads: 2}"), tmp_path / "two")
    run_stage(tiny("model=vit_att"), tmp_path / "three")
    two, three = (tmp_path / name / "task.safetensors" for name in ("two", "three"))
    task = load_task(two)
    state = create_backbone(tiny("model=vit_frozen").model).network.state_dict()

    def network(**arguments: int) -> torch.nn.Module:
        made = timm.create_model("digits_vit", num_classes=0, **arguments)
        made.load_state_dict(state)
        return made

    apply_task(network(**task.settings.arguments), task)
    with pytest.raises(UserError, match=r"num_heads of blocks\.0\.attn is 3, not 2; pass \*\*task\.settings\.argu"):
        apply_task(network(), task)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"^task: expected tasks of one backbone, got model\.arguments={'num_heads'"):
        run_stage(tiny("stage=predict", f"task=[{three},{two}]", f"stage.images={tmp_path / 'x.png'}"), tmp_path / "p")
