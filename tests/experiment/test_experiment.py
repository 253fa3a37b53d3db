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
import torch
from lightning.pytorch.utilities import rank_zero_only

from recast_exp.config.schema import Config
from recast_exp.data.store import PixelStore
from recast_exp.errors import MissingInputError
from recast_exp.experiment.experiment import Experiment
from recast_exp.experiment.probe import probe
from recast_exp.models.backbones import create_backbone
from recast_exp.training.loop import fit
from recast_exp.training.loop import test as measure
from support.fixtures_data import make_cub

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
