"""Fixtures of all tests: a cache of the session's own, composed configurations, small backbones with lively weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from recast_exp.config import grammar as overrides
from recast_exp.config import schema as config
from recast_exp.config.compose import Composer
from recast_exp.config.schema import Config, typed
from recast_exp.data.datamodule import ImageDataModule
from recast_exp.experiment.experiment import Experiment
from recast_exp.models.adapted import AdaptedModel
from recast_exp.models.digits import EMBEDDED
from recast_exp.runs import adopt as saved
from recast_exp.training.recipe import Recipe

TINY = (
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.limit_batches=2",
    "dataset.batch_size=8",
    "dataset.eval_batch_size=16",
    "probe=false",
)


@dataclass
class Run:
    """What a training run needs."""

    settings: Config
    recipe: Recipe
    experiment: Experiment
    adapted: AdaptedModel
    data: ImageDataModule


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:  # pretraining takes long: once for all processes of the session
        shared = tmp_path_factory.getbasetemp().parent / "backbones"
        shared.mkdir(exist_ok=True)
        (folder / "backbones").symlink_to(shared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAST_EXP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors here are small: with more threads, on a busy machine, they mostly wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compose_cfg() -> Callable[..., DictConfig]:
    """Overrides as typed → the configuration that Hydra gives a run."""
    composer = Composer()

    def compose_cfg(*texts: str) -> DictConfig:
        cfg = saved.adopt(copy.deepcopy(composer.compose(overrides.rewrite(texts, multirun=False)).cfg))
        assert config.problems(cfg) == []
        return cfg

    return compose_cfg


@pytest.fixture(scope="session")
def compose(compose_cfg: Callable[..., DictConfig]) -> Callable[..., Config]:
    """Overrides as typed → the settings of a run."""
    return lambda *texts: typed(compose_cfg(*texts))


@pytest.fixture(scope="session")
def enliven() -> Callable[[nn.Module], nn.Module]:
    """Redraws all weights of a model, so that no branch, norm, bias or running statistic is off, as many are at first.

    Fresh layer scales of 1e-5, zero biases and last BatchNorms of zero would hide any error behind them.
    """

    @torch.no_grad()
    def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") or (parameter.dim() > 1 and not name.endswith("weight")):
                parameter.copy_(0.3 * normal)
            elif parameter.dim() > 1:
                parameter.copy_(normal * ((2.0 if parameter.dim() > 2 else 1.0) / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        return model.eval()

    return enliven


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, enliven: Callable[..., nn.Module]) -> dict[str, Path]:
    """Files of random weights for the embedded backbones, so that none has to be pretrained."""
    folder = tmp_path_factory.mktemp("weights")
    files = {name: folder / f"{name}.safetensors" for name in EMBEDDED}
    for name, path in files.items():
        save_file(enliven(timm.create_model(name, num_classes=0)).state_dict(), path)
    return files


@pytest.fixture(scope="session")
def tiny_cfg(compose_cfg: Callable[..., DictConfig], weights: dict[str, Path]) -> Callable[..., DictConfig]:
    """As `compose_cfg`, for a run of seconds on the digits with random weights."""

    def tiny_cfg(*texts: str) -> DictConfig:
        own = any(text.startswith(("model.pretrained", "model.weights")) for text in texts)
        name = "digits_resnet" if any(text.startswith("model=resnet") for text in texts) else "digits_vit"
        return compose_cfg(*TINY, *(() if own else (f"model.weights={weights[name]}",)), *texts)

    return tiny_cfg


@pytest.fixture(scope="session")
def tiny(tiny_cfg: Callable[..., DictConfig]) -> Callable[..., Config]:
    """As `compose`, for a run of seconds on the digits with random weights."""
    return lambda *texts: typed(tiny_cfg(*texts))


@pytest.fixture(scope="session")
def build(tiny: Callable[..., Config]) -> Callable[..., Run]:
    """As `tiny`, with the model and the data that the settings ask for."""

    def build(*texts: str) -> Run:
        settings = tiny(*texts)
        experiment = Experiment.open(settings)
        banks, _ = experiment.banks()
        return Run(settings, experiment.recipe, experiment, experiment.adapt(banks), experiment.data())

    return build
